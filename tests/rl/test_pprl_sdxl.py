"""PPRL of Stable Diffusion: the policy generates what the pipeline generates, and a run trains and exports the UNet."""

import dataclasses
import functools
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax import rl
from clvr_jax.configs import pprl_sdxl
from clvr_jax.convert.architectures import UNET
from clvr_jax.convert.lora.trees import load_lora
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.sdxl import SDXLPipeline
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks.sdxl import LORA_TARGETS, Sampler, pprl_task
from tests.pipelines.sdxl.models import components
from tests.rl.pprl_toy import Brightness, changed

SAMPLER = Sampler(steps=3, guidance=2.0, size=32)
TRAIN = changed(
    mesh=MeshConfig(devices=1),
    prompts_per_epoch=4,
    group_size=4,
    epochs=2,
    lora={"targets": LORA_TARGETS},
    updates_per_epoch=1,
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Two text encoders or one -> a small pipeline with random weights, which tests only read."""

    @functools.cache
    def load(is_xl):
        directory = tmp_path_factory.mktemp("model")
        kind = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
        kind(**components(is_xl, "euler" if is_xl else "pndm", False)).save_pretrained(directory)
        return SDXLPipeline.from_pretrained(str(directory))

    return load


def make_task(dataset, pipe, train=TRAIN):
    steps = ProxySteps(TrajectoryDataset(dataset), SAMPLER.size, first_images_only=True)
    return pprl_task("PPRL", pipe, train, SAMPLER, steps, Brightness(), save_dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("is_xl", [True, False])
def test_the_policy_generates_the_images_of_the_pipeline(dataset, load, is_xl):
    """With two text encoders, pooled features, sizes and guidance away from zeros; and with one, away from ""."""
    pipe = load(is_xl)
    task = make_task(dataset, pipe)
    assert {step.kind for step in task.steps.steps} == {0}
    noise = np.random.default_rng(0).normal(size=(2, *task.policy.latent_shape)).astype(np.float32)

    @jax.jit
    def sample(base, frozen, data, noise):
        conditions = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), task.policy.encode_conditions(frozen, data))
        return task.policy.decode(frozen, task.policy.solve(task.policy.predictor(base, conditions), noise))

    step = task.steps.steps[0]
    images = sample(task.base, task.frozen, task.data([step]), noise)
    expected = pipe(
        [task.steps.prompt(step)] * 2,
        num_inference_steps=SAMPLER.steps,
        guidance_scale=SAMPLER.guidance,
        height=SAMPLER.size,
        width=SAMPLER.size,
        latents=noise.transpose(0, 3, 1, 2),
        solver="ddim",
        output_type="np",
    ).images
    np.testing.assert_allclose(images, expected, atol=2e-4)
    assert np.asarray(images).std() > 0.05


@pytest.mark.slow
def test_the_unet_learns_and_is_exported(dataset, load, tmp_path):
    pipe = load(is_xl=False)
    task = make_task(dataset, pipe)
    state = rl.fit(task, TRAIN, tmp_path)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert np.isfinite([*first.values(), *second.values()]).all()
    assert first["kl"] < 1e-9 < second["kl"]  # at the first update all policies are the same
    assert first["grad_norm"] > 0
    expected = TRAIN.policy_weights(task.base, state.ema)
    exported = nnx.state(SDXLPipeline.from_pretrained(str(tmp_path / "export")).unet)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exported, expected)
    lora = load_lora(tmp_path / "export" / "lora", UNET.key_mapping(pipe.unet.config), task.base)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), TRAIN.policy_weights(task.base, lora), expected
    )


def test_what_cannot_be_trained_is_refused(dataset, load):
    with pytest.raises(ClvrError, match="--model is missing"):
        pprl_sdxl.task(pprl_sdxl.CONFIG)
    pipe = load(is_xl=False)
    edits = ProxySteps(TrajectoryDataset(dataset), SAMPLER.size)
    with pytest.raises(UsageError, match="conditioned on text alone"):
        pprl_task("PPRL", pipe, TRAIN, SAMPLER, edits, Brightness())
    first = ProxySteps(TrajectoryDataset(dataset), SAMPLER.size, first_images_only=True)
    with pytest.raises(UsageError, match="multiple of 8 pixels"):
        pprl_task("PPRL", pipe, TRAIN, Sampler(size=36), first, Brightness())


@pytest.mark.slow
def test_the_programs_of_the_full_size_fit_together():
    """Traced, not compiled: what the rollout returns is what the update takes."""
    rollout = pprl_sdxl.program(pprl_sdxl.CONFIG)
    update = pprl_sdxl.program(dataclasses.replace(pprl_sdxl.CONFIG, planned="update"))
    sampled = jax.eval_shape(rollout.function, rollout.weights, rollout.data)
    assert sampled.images.shape == (16, 1024, 1024, 3)
    assert update.data.samples.shape == sampled.samples.shape
    assert jax.tree.structure(sampled.conditions) == jax.tree.structure(update.data.conditions)
    trained = sum(leaf.size for leaf in jax.tree.leaves(update.weights["params"]))
    assert 0.02 < trained / sum(leaf.size for leaf in jax.tree.leaves(update.weights["base"])) < 0.2
