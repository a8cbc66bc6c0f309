"""One step, however it is cut: meshes, parts of a batch and the number of devices change nothing but rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.sharding import MeshConfig, MeshLayout, Rules, parameter_axes
from clvr_jax.training.objectives.losses import next_token_loss
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.training.prefetch import prefetch
from clvr_jax.training.trainer import Task, TrainConfig, fit
from tests.training import drawing_recipe

DRAWING = drawing_recipe.CONFIG
QWEN3 = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    tie_word_embeddings=True,
)
MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(data=2, fsdp=1, tensor=4),
    "sequence": MeshConfig(fsdp=2, sequence=4),
    "mixed": MeshConfig(data=2, fsdp=1, sequence=2, tensor=2),
}
ONE = MeshConfig(devices=1)


def talking_task():
    graphdef, params = nnx.split(Qwen3(QWEN3, rngs=nnx.Rngs(0)))
    params = jax.device_get(params)  # as in `drawing_recipe`

    def loss(params, frozen, batch, key):
        logits = nnx.merge(graphdef, params)(batch["ids"], batch["mask"])
        return next_token_loss(logits, batch["ids"], batch["weights"])

    def batches(step):
        rng = np.random.default_rng(step)
        lengths = rng.integers(4, 17, 16)
        mask = (np.arange(16) < lengths[:, None]).astype(np.int32)
        weights = mask * (np.arange(16) >= rng.integers(1, 4, 16)[:, None])
        return {"ids": rng.integers(0, 64, (16, 16)), "mask": mask, "weights": weights.astype(np.float32)}

    return Task("talking", params, {}, loss, batches, lambda ema, folder: None)


def losses(task, steps=8, stop_after=None, **options):
    """Losses and gradient norms of every step; no checkpoint, which compiles a program for each shape of a part."""
    config = TrainConfig(steps=steps, learning_rate=3e-3, **options)
    rows = []
    with MeshLayout(config.mesh.make()).active() as layout:
        state = TrainState.create(task.params, config.optimizer(), layout)
        train_step = make_train_step(task.loss, config.optimizer(), config.step, layout)
        for batch, _ in prefetch(task.batches, layout, range(stop_after or steps), config.gradient_accumulation_steps):
            state, metrics = train_step(state, task.frozen, batch)
            rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(rows)


@pytest.fixture(scope="module", params=["drawing", "talking"])
def task(request):
    return drawing_recipe.task(DRAWING) if request.param == "drawing" else talking_task()


@pytest.fixture(scope="module")
def alone(task):
    return losses(task, mesh=ONE)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_first_steps_are_the_same_on_every_mesh(task, alone, name):
    """Four of eight: on eight virtual devices a step takes most of its time to synchronize them."""
    np.testing.assert_allclose(losses(task, stop_after=4, mesh=MESHES[name]), alone[:4], rtol=2e-4)
    assert alone[-1, 0] < 0.98 * alone[0, 0]


@pytest.mark.slow
def test_a_batch_in_parts_adds_up_to_the_whole():
    task = talking_task()
    whole = losses(task, steps=5, mesh=ONE)
    parts = losses(task, steps=5, mesh=MeshConfig(devices=2), gradient_accumulation_steps=4)
    np.testing.assert_allclose(parts, whole, rtol=2e-5)


def test_every_device_holds_its_part_of_the_state():
    task = drawing_recipe.task(DRAWING)
    with MeshLayout(MeshConfig(fsdp=8).make()).active() as layout:
        state = TrainState.create(task.params, TrainConfig().optimizer(), layout)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(state))
    assert held < 0.14 * whole  # an eighth, and the vectors


def test_the_program_on_a_mesh_has_the_shardings_of_the_table():
    layout = MeshLayout(MeshConfig(fsdp=4, tensor=2).make())
    shardings = layout.parameters(nnx.state(abstract_module(lambda rngs: Flux2Transformer(DRAWING.sizes, rngs=rngs))))
    blocks = shardings["transformer_blocks"]
    assert blocks["attn"]["to_q"]["kernel"].get_value().spec == jax.P(None, ("fsdp",), ("tensor",))
    assert blocks["attn"]["to_out"][0]["kernel"].get_value().spec == jax.P(None, ("tensor",), ("fsdp",))
    assert blocks["ff"]["linear_in"]["kernel"].get_value().spec == jax.P(None, ("fsdp", "tensor"), None)


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("model.layers.self_attn.q_proj.kernel", (4, 8, 8), (None, "embed", "heads_out")),
        ("model.embed_tokens.embedding", (100, 8), ("vocab", "embed")),
        ("down_blocks.0.resnets.0.conv1.kernel", (3, 3, 8, 16), (None, None, None, "embed")),
        ("x_embedder.kernel", (16, 8), ("embed", None)),
        ("model.norm.scale", (8,), (None,)),
    ],
)
def test_parameters_are_told_apart_by_their_names(name, shape, axes):
    assert parameter_axes(name, shape) == axes


def test_an_axis_that_does_not_divide_is_left_out_and_one_used_twice_refused():
    layout = MeshLayout(MeshConfig(fsdp=4, sequence=2).make())
    assert layout.spec(("embed", None), (12, 3)) == jax.P(("fsdp",), None)
    assert layout.spec(("embed", None), (7, 3)) == jax.P(None, None)
    with pytest.raises(ClvrError, match="twice"):
        layout.spec(("embed", "fused_qkv_mlp"), (8, 8))
    with pytest.raises(ClvrError, match="heads"):
        Rules(heads=("tensor", "tensor"))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 3}, "is 3 devices, but there are 8"),
        ({"data": -1, "fsdp": -1}, "one may be -1"),
        ({"tensor": 0}, "at least 1"),
        ({"slices": 2}, "multiple of the 2 slices"),
        ({"devices": 9}, "9 devices are requested, but there are 8"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(mesh, message):
    with pytest.raises(UsageError, match=message):
        MeshConfig(**mesh).make()


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path):
    task = dataclasses.replace(talking_task(), batches=lambda step: {"ids": np.zeros((12, 4), int)})
    with pytest.raises(UsageError, match="12 rows cannot be sharded into 8 parts"):
        fit(task, TrainConfig(steps=1), tmp_path)


@pytest.mark.slow
def test_master_weights_stay_float32_where_the_loss_is_computed_in_bfloat16(tmp_path):
    seen = []
    task = talking_task()

    def loss(params, frozen, batch, key):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return task.loss(params, frozen, batch, key)

    watched = dataclasses.replace(task, loss=loss)
    state = fit(watched, TrainConfig(steps=2, compute_dtype="bfloat16", mesh=ONE), tmp_path)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
