import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.tasks.shapes import sizes
from clvr_jax.training.optimization.initialization import scaled
from tests.models.parity import run_jitted

TREE = {"block": {"out": jnp.full(3, 2.0), "norm": jnp.ones(2)}, "embed": jnp.full(4, 0.5)}


def test_the_first_pattern_that_is_found_counts():
    made = scaled(TREE, {"out": 0.0, "block": 3.0, "^embed$": 2.0})
    assert jax.tree.map(lambda leaf: leaf.tolist(), made) == {
        "block": {"out": [0, 0, 0], "norm": [3, 3]},
        "embed": [1, 1, 1, 1],
    }


def test_a_pattern_without_a_weight_is_an_error():
    with pytest.raises(ClvrError, match="no parameter is matched first by 'o_proj'"):
        scaled(TREE, {"embed": 2.0, "o_proj": 0.0})


@pytest.mark.slow
def test_models_begin_with_tokens_as_they_are_and_draw_nothing():
    """Residual branches are closed: every hidden state is the embedding, of unit size, and the velocity is zero."""
    encoder = Qwen3(sizes.TEXT_ENCODER, rngs=nnx.Rngs(0))
    nnx.update(encoder, scaled(nnx.state(encoder), sizes.TEXT_START))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 640, (2, 9)))
    states = run_jitted(lambda model, ids: model.hidden_states(ids, jnp.ones_like(ids), (0, 2, 4)), encoder, ids)
    first, second, _ = states
    assert np.array_equal(first, second)
    assert 0.9 < float(first.std()) < 1.1
    transformer = Flux2Transformer(sizes.TRANSFORMER, rngs=nnx.Rngs(0))
    nnx.update(transformer, scaled(nnx.state(transformer), sizes.TRANSFORMER_START))
    config = sizes.TRANSFORMER
    tokens = jnp.ones((1, 16, config.in_channels))
    text = jnp.ones((1, 5, config.joint_attention_dim))
    positions = np.zeros((16, 4), np.int32), np.zeros((5, 4), np.int32)
    out = run_jitted(lambda model, *arrays: model(*arrays, *positions), transformer, tokens, text, jnp.ones(1))
    assert not np.asarray(out).any()
