"""The recipe of a LoRA of klein, on a small random model of the same classes."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from clvr_jax.configs import flux2_lora
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.lora.trees import load_lora
from clvr_jax.convert.rules import state_to_torch
from clvr_jax.errors import ClvrError
from clvr_jax.merging.deltas import apply_delta
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks.flux2 import LORA_FILES
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.training.trainer import fit
from tests.convert.lora.models import OTHER_PARTS

STEPS = 24
TRAIN = dataclasses.replace(
    flux2_lora.CONFIG.train,
    steps=STEPS,
    learning_rate=1e-2,
    warmup=0.0,
    log_every=1,
    compute_dtype="float32",
    mesh=MeshConfig(devices=1),
)


def write_pairs(directory):
    """Four captions, of two sizes, and two edits."""
    directory.mkdir()
    lines = []
    for number, (size, color) in enumerate(
        [((64, 64), "red"), ((64, 64), "blue"), ((96, 48), "red"), ((96, 48), "blue")]
    ):
        Image.new("RGB", size, color).save(directory / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": f"all {color}"})
    lines += [{"source": f"{a}.png", "instruction": "the other color", "target": f"{1 - a}.png"} for a in (0, 1)]
    (directory / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.fixture(scope="module")
def config(small_flux2, tmp_path_factory):
    return dataclasses.replace(
        flux2_lora.CONFIG,
        model=str(small_flux2),
        dataset=write_pairs(tmp_path_factory.mktemp("lora") / "pairs"),
        size=64,
        batch_size=4,
        dropout=0.0,
        train=TRAIN,
        lora=LoRAConfig(rank=4, alpha=6.0, targets=flux2_lora.CONFIG.lora.targets),
        formats=("diffusers", "comfyui", "kohya"),
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The final state, and the directory of a run that was interrupted and resumed."""
    out = tmp_path_factory.mktemp("run") / "resumed"
    fit(flux2_lora.task(config), TRAIN, out, stop_after=3)
    return fit(flux2_lora.task(config), TRAIN, out, resume=True), out


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_loss_falls_and_a_resumed_run_is_the_uninterrupted_one(config, trained, tmp_path):
    _, out = trained
    found = losses(out)
    assert len(found) == STEPS
    assert np.mean(found[-6:]) < 0.8 * np.mean(found[:6])
    fit(flux2_lora.task(config), TRAIN, tmp_path / "alone", stop_after=6)
    np.testing.assert_allclose(found[:6], losses(tmp_path / "alone"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", LORA_FILES)
def test_each_format_returns_the_trained_model_in_ours_and_in_diffusers(config, trained, name):
    state, out = trained
    transformer = Flux2Pipeline.from_pretrained(config.model).transformer
    key_mapping = FLUX2_TRANSFORMER.key_mapping(transformer.config)
    base = nnx.state(transformer)
    expected = state_to_torch(apply_delta(base, state.params), key_mapping)
    plain = state_to_torch(base, key_mapping)
    file = out / "export" / LORA_FILES[name]
    ours = state_to_torch(apply_delta(base, load_lora(file, key_mapping, transformer)), key_mapping)
    reference = diffusers.Flux2Transformer2DModel.from_pretrained(f"{config.model}/transformer")
    pipeline = diffusers.Flux2KleinPipeline(**dict.fromkeys(OTHER_PARTS), transformer=reference)
    pipeline.load_lora_weights(out / "export", weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    theirs = {key: tensor.numpy() for key, tensor in reference.state_dict().items()}
    assert theirs.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_allclose(ours[key], tensor, atol=1e-5, err_msg=key)
        np.testing.assert_allclose(theirs[key], tensor, atol=1e-5, err_msg=key)
    adapted = [key for key in plain if np.abs(expected[key] - plain[key]).max() > 1e-3]
    assert len(adapted) >= 10


@pytest.mark.slow
def test_the_directory_of_a_run_is_given_to_a_pipeline(config, trained):
    _, out = trained
    pipeline = Flux2Pipeline.from_pretrained(config.model, lora=[str(out / "export")])
    assert pipeline("all red", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("references", [0, 1])
def test_the_step_of_the_real_model_has_the_shapes_of_its_state(references):
    config = dataclasses.replace(flux2_lora.CONFIG, batch_size=2, size=128, references=references)
    task = flux2_lora.abstract_task(config)
    optimizer = config.train.optimizer()
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), task.params)
    step = make_train_step(task.loss, optimizer, config.train.step)
    following, metrics = jax.eval_shape(step, state, task.frozen, task.batches(0))
    assert [leaf.shape for leaf in jax.tree.leaves(following)] == [leaf.shape for leaf in jax.tree.leaves(state)]
    assert metrics["loss"].shape == ()
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (task.params, task.frozen["base"]))
    assert trained < 0.02 * frozen


def test_what_is_to_be_trained_must_be_given(config):
    with pytest.raises(ClvrError, match="--model is missing"):
        flux2_lora.task(flux2_lora.CONFIG)
    with pytest.raises(ClvrError, match=r"--lora\.rank must be at least 1"):
        flux2_lora.task(dataclasses.replace(config, lora=LoRAConfig(rank=0)))
    with pytest.raises(ClvrError, match="no such directory of image-caption pairs"):
        flux2_lora.task(dataclasses.replace(config, dataset=config.dataset / "absent"))
