"""The recipe of klein's fine-tuning, on the small model of the same classes and a dataset of simulated trajectories."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from clvr_jax.configs import flux2_sft
from clvr_jax.data.trajectories.dataset import write_dataset
from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.training.trainer import fit
from tests.data.simulated import TWO_IMAGES, simulated

TRAIN = dataclasses.replace(flux2_sft.CONFIG.train, steps=3, log_every=1, mesh=MeshConfig(devices=1))


@pytest.mark.slow
def test_a_dataset_is_trained_on_and_the_result_is_a_pipeline(tmp_path):
    write_dataset(tmp_path / "data", map(simulated, TWO_IMAGES))
    config = dataclasses.replace(
        flux2_sft.CONFIG, model="shapes-tiny-sft", dataset=tmp_path / "data", batch_size=4, train=TRAIN
    )
    task = flux2_sft.task(config)
    before = jax.tree.map(lambda leaf: leaf.copy(), task.params)
    state = fit(task, TRAIN, tmp_path / "run", stop_after=2)
    state = fit(flux2_sft.task(config), TRAIN, tmp_path / "run", resume=True)  # the input's position goes on too
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["loss"] < 2 and row["tokens_per_second"] > 0 for row in rows)
    assert any((old != new).any() for old, new in zip(*map(jax.tree.leaves, (before, state.params)), strict=True))
    drawn = Flux2Pipeline.from_pretrained(str(tmp_path / "run" / "export"))("a red circle", num_inference_steps=2)
    assert drawn.images[0].size == (64, 64)


@pytest.mark.slow
def test_trajectories_are_trained_on_at_once_for_a_cache_that_a_loop_keeps(tmp_path):
    write_dataset(tmp_path / "data", map(simulated, TWO_IMAGES))
    config = dataclasses.replace(
        flux2_sft.CONFIG,
        model="shapes-tiny-sft",
        dataset=tmp_path / "data",
        batch_size=2,
        train=dataclasses.replace(TRAIN, steps=1),
        reference_cache="loop",
    )
    task = flux2_sft.task(config)
    fit(task, config.train, tmp_path / "run")
    trained = Flux2Pipeline.from_pretrained(str(tmp_path / "run" / "export"))
    assert trained.reference_cache == "loop"
    again = dataclasses.replace(config, model=str(tmp_path / "run" / "export"), reference_cache=None)
    assert "seen" in next(flux2_sft.task(again).batches)


def test_packing_leaves_out_the_references_that_images_share():
    config = dataclasses.replace(flux2_sft.CONFIG, batch_size=1, size=1024, references=7)
    loop = flux2_sft.abstract_task(dataclasses.replace(config, reference_cache="loop"))
    packed = loop.tokens(loop.batches(0))
    assert packed == 8 * (512 + 4096) + 7 * 4096
    single = [flux2_sft.abstract_task(dataclasses.replace(config, references=count)) for count in range(8)]
    assert sum(task.tokens(task.batches(0)) for task in single) == 8 * (512 + 4096) + 28 * 4096
    flops = sum(task.flops(task.batches(0)) for task in single)
    assert flops > 2 * loop.flops(loop.batches(0))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["klein-4b", "klein-9b"])
def test_the_step_of_the_real_model_has_the_shapes_of_its_state(preset):
    config = dataclasses.replace(flux2_sft.CONFIG, preset=preset, batch_size=2, size=128, references=2)
    task = flux2_sft.abstract_task(config)
    optimizer = config.train.optimizer()
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), task.params)
    step = make_train_step(task.loss, optimizer, config.train.step)
    following, metrics = jax.eval_shape(step, state, task.frozen, task.batches(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), following) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.to_pure_dict(task.params))} == {"float32"}
    # 6 FLOPs for each parameter and token; less, since text and image have weights of their own in the first blocks and
    # modulations see no token; more, by attention and the frozen models.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    tokens = task.tokens(task.batches(0))
    assert tokens == 2 * (512 + 3 * 64)
    assert 0.8 < task.flops(task.batches(0)) / (6 * parameters * tokens) < 1.8


def test_what_is_to_be_trained_must_be_named():
    with pytest.raises(ClvrError, match="--model is missing"):
        flux2_sft.task(flux2_sft.CONFIG)
