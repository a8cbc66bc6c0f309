import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.lora import factor_shapes, init_lora, is_pair
from clvr_jax.trees import dotted, leaves_by_path


def test_init_lora_is_that_of_peft():
    params = {"attn": {"to_q": {"kernel": jnp.ones((2, 400, 30))}, "conv": {"kernel": jnp.ones((3, 3, 40, 5))}}}
    lora = init_lora(params, [r"to_q\.", "conv"], 8, 16, jax.random.key(0))["attn"]
    assert lora["to_q"]["kernel"].scale == 2.0
    assert (lora["to_q"]["kernel"].a.shape, lora["to_q"]["kernel"].b.shape) == ((2, 400, 8), (2, 8, 30))
    assert (lora["conv"]["kernel"].a.shape, lora["conv"]["kernel"].b.shape) == ((3, 3, 40, 8), (1, 1, 8, 5))
    for name, inputs in (("to_q", 400), ("conv", 360)):
        a, bound = lora[name]["kernel"].a, inputs**-0.5
        assert 0.99 * bound < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert [dotted(path) for path in leaves_by_path(lora, is_pair)] == ["conv.kernel", "to_q.kernel"]


def test_wrong_targets_and_ranks_are_refused():
    params = {"to_q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ClvrError, match=r"targets to_k match no kernel's path; kernels are to_q\.kernel"):
        init_lora(params, ["to_q", "to_k"], 2, 2, jax.random.key(0))
    with pytest.raises(ClvrError, match="rank is 0"):
        init_lora(params, ["to_q"], 0, 2, jax.random.key(0))
    with pytest.raises(ClvrError, match="neither linear"):
        factor_shapes((2, 3, 3, 4, 5), 2)
