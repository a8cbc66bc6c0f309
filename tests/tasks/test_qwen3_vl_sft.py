"""The recipe of the controller's fine-tuning, on the small model of the same class and simulated trajectories."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.configs import qwen3_vl_sft
from clvr_jax.data.engine.engine import synthesize
from clvr_jax.data.engine.roles.shapes import make_shapes_roles
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.data.sft_examples import record_conversation
from clvr_jax.data.trajectories.dataset import write_dataset
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.sharding import MeshConfig, MeshLayout
from clvr_jax.training.objectives.losses import next_token_loss
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.training.prefetch import prefetch
from clvr_jax.training.trainer import fit
from tests.data.engine.exact_generator import MistakesAt, item
from tests.data.simulated import simulated
from tests.models.qwen3_vl.reference import compiled

ONE = MeshConfig(devices=1)
TRAIN = dataclasses.replace(qwen3_vl_sft.CONFIG.train, steps=3, log_every=1, mesh=ONE)
PARAMETERS = {"qwen3-vl-2b": 2_127_532_032, "qwen3-vl-4b": 4_437_815_808, "qwen3-vl-8b": 8_767_123_696}
"""Of Qwen/Qwen3-VL-{2B,4B,8B}-Instruct, vision tower included, tied embeddings counted once."""
VISION = ("model", "visual")
SEVERAL = (0, 4, 7) * 4
"""Seeds of conversations with three pictures: one program."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "trajectories"
    write_dataset(folder, map(simulated, range(12)))
    return folder


def tiny(dataset, **changes):
    train = dataclasses.replace(TRAIN, **changes.pop("train", {}))
    changes = {"batch_size": 4, "loss_block": 64, **changes}
    return dataclasses.replace(qwen3_vl_sft.CONFIG, model="shapes-tiny", dataset=dataset, train=train, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("train_vision", [False, True])
def test_a_dataset_is_trained_on_and_the_result_is_transformers(tmp_path, train_vision):
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    write_dataset(tmp_path / "data", map(simulated, SEVERAL))
    config = tiny(tmp_path / "data", train_vision=train_vision)
    state = fit(qwen3_vl_sft.task(config), config.train, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["loss"] < 1 and row["token_accuracy"] > 0.8 and row["tokens_per_second"] > 0 for row in rows)

    export = tmp_path / "run" / "export"
    theirs, told = Qwen3VLForConditionalGeneration.from_pretrained(
        export, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(told.values()), told
    before = Qwen3VLForConditionalGeneration.from_pretrained(SHIPPED / "shapes-tiny" / "controller").state_dict()
    changed = {name for name, now in theirs.state_dict().items() if (now != before[name].to(torch.bfloat16)).any()}
    assert any("visual" in name for name in changed) == train_vision
    assert "lm_head.weight" in changed
    ours = Qwen3VLPipeline.from_pretrained(export)
    kernel = np.asarray(state.ema["lm_head"]["kernel"][...].astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(ours.model.lm_head.kernel[...], kernel)
    np.testing.assert_array_equal(theirs.lm_head.weight.detach().float().numpy().T, kernel)
    if not train_vision:  # one export that chats is enough
        picture = {"type": "image"}
        said = ours.chat([{"role": "user", "content": [picture]}], [np.full((64, 64, 3), 250, np.uint8)], 4)
        assert isinstance(said, str)


@pytest.mark.slow
@pytest.mark.parametrize("train_vision", [False, True])
def test_the_loss_is_that_of_all_logits_and_a_frozen_tower_is_no_parameter(dataset, train_vision):
    """Against the model's own logits of every token."""
    config = tiny(dataset, train_vision=train_vision, train={"compute_dtype": "float32"})
    task = qwen3_vl_sft.task(config)
    batch = next(batch for batch in task.batches if len(batch.get("grid_thw", ())) > 1)
    pipe = Qwen3VLPipeline.from_pretrained(SHIPPED / "shapes-tiny" / "controller")
    names = ("input_ids_bt", "pixel_values", "grid_thw", "attention_mask_bt")
    arguments = {name: batch[name] for name in names} | {"positions_3bt": batch["positions_b3t"].swapaxes(0, 1)}
    logits = compiled(pipe.model, **arguments)
    expected, metrics = next_token_loss(logits, batch["input_ids_bt"], batch["weights_bt"])
    loss, found = jax.jit(task.loss)(task.params, task.frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert found["weight"] == metrics["weight"] == batch["weights_bt"].sum()
    np.testing.assert_allclose(found["token_accuracy"], metrics["token_accuracy"], rtol=1e-5)
    assert any(path[:2] == VISION for path, _ in nnx.to_flat_state(task.params)) == train_vision
    assert (len(task.frozen) == 0) == train_vision
    task.batches.close()


def test_the_verification_examples_of_a_dataset_are_learned_unless_they_are_left_out(tmp_path):
    one = item(0)
    outcome = synthesize(one, make_shapes_roles(one), MistakesAt(0), seed=5)
    write_dataset(tmp_path / "data", [outcome.record, *outcome.verification])
    last_turns = {record_conversation(example)[0][-1] + "<|im_end|>" for example in outcome.verification}
    for verification, found in ((True, last_turns), (False, set())):
        task = qwen3_vl_sft.task(tiny(tmp_path / "data", batch_size=1, verification=verification))
        tokenizer = load_tokenizer(SHIPPED / "shapes-tiny" / "tokenizer")
        taught = set()
        for _ in range(3):
            batch = next(task.batches)
            taught.add(tokenizer.decode(batch["input_ids_bt"][batch["weights_bt"] > 0]))
        task.batches.close()
        assert len(taught) == 1 + len(found)
        assert found <= taught


def test_grids_are_part_of_the_shape_of_a_batch(dataset):
    """They pass the way to the devices as they are, and another number of pictures is another program."""
    task = qwen3_vl_sft.task(tiny(dataset))
    with MeshLayout(MeshConfig(fsdp=4, devices=4).make()).active() as layout:
        batches = [batch for batch, _ in prefetch(task.batches, layout, range(6), 1)]
    grids = [batch.get("grid_thw", ()) for batch in batches]
    assert len(set(grids)) > 1
    assert all(set(own) <= {(1, 8, 8)} for own in grids)
    programs = jax.jit(lambda batch: jnp.float32(len(batch.get("grid_thw", ()))))
    assert [int(programs(batch)) for batch in batches] == [len(own) for own in grids]
    for batch in batches:
        rows, patches = batch["pixel_values"].shape[:2] if "pixel_values" in batch else (4, 0)
        assert (rows, patches) == (4, 64 * len(batch.get("grid_thw", ())))
        said = np.take_along_axis(np.asarray(batch["weights_bt"]), np.asarray(batch["learned_bk"]), axis=1)
        assert said.sum() == batch["weights_bt"].sum()
    task.batches.close()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PARAMETERS)
def test_the_step_of_the_real_model_has_the_shapes_of_its_state(preset):
    config = dataclasses.replace(qwen3_vl_sft.CONFIG, preset=preset, batch_size=2, size=128, images=3)
    task = qwen3_vl_sft.abstract_task(config)
    optimizer = config.train.optimizer()
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), task.params)
    step = make_train_step(task.loss, optimizer, config.train.step)
    batch = task.batches(0)
    following, metrics = jax.eval_shape(step, state, task.frozen, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), following) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()
    trained, frozen = ({leaf.dtype.name for leaf in jax.tree.leaves(tree)} for tree in (task.params, task.frozen))
    assert (trained, frozen) == ({"float32"}, {"bfloat16"})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    assert parameters + sum(leaf.size for leaf in jax.tree.leaves(task.frozen)) == PARAMETERS[preset]
    # 6 FLOPs for each parameter and token; less, since most tokens get no logits and none is multiplied with the
    # embeddings; more, by attention and the vision tower.
    tokens = task.tokens(batch)
    assert tokens == 2 * (2048 + 3 * 16)
    assert 0.8 < task.flops(batch) / (6 * parameters * tokens) < 1.3
    everything = qwen3_vl_sft.abstract_task(dataclasses.replace(config, train_vision=True))
    assert sum(leaf.size for leaf in jax.tree.leaves(everything.params)) == PARAMETERS[preset]
    assert everything.flops(batch) > task.flops(batch)


def test_an_abstract_batch_is_like_a_real_one(dataset):
    config = tiny(dataset)
    task = qwen3_vl_sft.task(config)
    real = next(batch for batch in task.batches if "grid_thw" in batch)
    task.batches.close()
    shapes = qwen3_vl_sft.abstract_task(qwen3_vl_sft.CONFIG).batches(0)

    def kinds(batch):
        arrays = {name: (leaf.ndim, leaf.dtype) for name, leaf in batch.items() if name != "grid_thw"}
        return arrays, type(batch["grid_thw"])

    assert kinds(real) == kinds(shapes)
    assert set(map(len, shapes["grid_thw"])) == {3}


def test_what_does_not_fit_is_named():
    with pytest.raises(ClvrError, match="--model is missing"):
        qwen3_vl_sft.task(qwen3_vl_sft.CONFIG)
    with pytest.raises(UsageError, match="size 100 must be a multiple of 32 pixels"):
        qwen3_vl_sft.abstract_task(dataclasses.replace(qwen3_vl_sft.CONFIG, size=100))
    with pytest.raises(UsageError, match="at least 1"):
        dataclasses.replace(qwen3_vl_sft.CONFIG, loss_block=0)
