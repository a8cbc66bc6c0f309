"""The loss in blocks is the loss of all logits at once, on every mesh, and holds fewer of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.cost_model.hlo import collectives
from clvr_jax.sharding import MeshConfig, MeshLayout
from clvr_jax.training.objectives.losses import next_token_loss
from clvr_jax.training.objectives.sft import conversation_loss
from clvr_jax.training.objectives.token_loss import next_token_loss_in_blocks

B, T, D, V = 8, 12, 16, 64


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    states, head = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    tokens, weights = rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.6
    return states.astype(np.float32), head.astype(np.float32), tokens.astype(np.int32), weights.astype(np.float32)


def whole(states, head, tokens, weights):
    """Targets stand beside the states that predict them; `next_token_loss` has them one place later."""
    shifted = [jnp.pad(x, ((0, 0), (1, 0))) for x in (tokens, weights)]
    return next_token_loss(jnp.pad(states @ head, ((0, 0), (0, 1), (0, 0))), *shifted)


def loss_and_grads(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def close(found, expected):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-7), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_blocks_add_up_to_the_whole(arrays, block):
    def in_blocks(*arrays):
        return next_token_loss_in_blocks(*arrays, block)

    close(loss_and_grads(in_blocks)(*arrays), loss_and_grads(whole)(*arrays))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(fsdp=2, sequence=4),
        MeshConfig(fsdp=1, sequence=8),  # does not divide the tokens
    ],
    ids=str,
)
def test_the_loss_is_the_same_on_every_mesh(arrays, mesh):
    with MeshLayout(mesh.make()).active():
        found = loss_and_grads(lambda *arrays: next_token_loss_in_blocks(*arrays, 2))(*arrays)
    close(found, loss_and_grads(whole)(*arrays))


def test_nothing_is_sent_at_every_block():
    """Each device adds up its own gradient of the head; the loop over blocks waits for nobody."""
    with MeshLayout(MeshConfig(fsdp=8).make()).active() as layout:

        def place(shape, *axes, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes, shape))

        arguments = (
            place((B, 256, D), "batch", None, None),
            place((D, V), "embed", "vocab"),
            place((B, 256), "batch", None, dtype=jnp.int32),
            place((B, 256), "batch", None),
        )
        step = jax.jit(jax.grad(lambda *a: next_token_loss_in_blocks(*a, 16)[0], argnums=(0, 1)))
        program = step.lower(*arguments).compile().as_text()
        found = collectives(program, layout.mesh.shape)
    assert "known_trip_count" in program  # the loop over 16 blocks
    assert found
    assert {one.times for one in found} == {1}


@pytest.mark.slow
def test_only_what_the_assistant_says_counts(arrays):
    states, head, tokens, weights = arrays
    weights = weights.copy()
    weights[:, 0] = 0  # nothing is said before the first token
    learned = np.zeros((B, T), np.int32)
    for row, said in zip(learned, weights, strict=True):
        row[: int(said.sum())] = np.flatnonzero(said)
    data = {"input_ids_bt": tokens, "weights_bt": weights, "learned_bk": learned}

    def loss(states, data):
        return conversation_loss(states, head, data, 5)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(states, data)
    close((value, metrics), next_token_loss(states @ head, tokens, weights))
    # Other words of the user change nothing, and no gradient comes from where the user speaks.
    others = np.where(weights > 0, tokens, (tokens + 1) % V)
    assert loss(states, {**data, "input_ids_bt": others})[0] == value
    is_before_said = np.pad(weights[:, 1:], ((0, 0), (0, 1))) > 0
    assert ((np.abs(grad).max(axis=-1) > 0) == is_before_said).all()
    said = np.where(weights > 0, (tokens + 1) % V, tokens)
    assert loss(states, {**data, "input_ids_bt": said})[0] != value
