"""FLUX.2 through the real loop, in the shapes world, as its recipe does it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from clvr_jax import rl
from clvr_jax.configs import pprl_flux2, pprl_shapes
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.convert.lora.trees import load_lora
from clvr_jax.data.preprocessing.histories import token_count
from clvr_jax.data.preprocessing.text import encode_prompts
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Pipeline
from clvr_jax.rewards import ProxyReward, ShapesJudge, WeightedReward
from clvr_jax.tasks.flux2 import LORA_TARGETS, Sampler, pprl_task
from clvr_jax.training.optimization.optimizer import AdamWConfig
from clvr_jax.training.plan import plan
from clvr_jax.training.recipes import load_recipe
from clvr_jax.trees import dotted, leaves_by_path
from tests.helpers.models import small_flux2
from tests.rl.pprl_toy import Brightness, changed, make_dataset

ROOT = Path(__file__).parents[2]
SAMPLER = Sampler(steps=2, guidance=1.7, size=64)
# A first drawing and an edit of one picture.
TRAIN = changed(
    epochs=1,
    prompts_per_epoch=2,
    updates_per_epoch=1,
    timesteps_per_sample=1,
    lora={"targets": LORA_TARGETS},
    grid_every=1,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "trajectories", 6)


def tiny_flux2():
    """The shipped pipeline with a small transformer that knows nothing."""
    pipe = small_flux2("shapes-tiny-sft")
    pipe.settings = dataclasses.replace(pipe.settings, text_buckets=(256,))
    return pipe


def shapes_task(dataset, train=TRAIN):
    """A model that knows nothing draws nothing that the program likes: brightness tells its pictures apart."""
    proxy = ProxyReward(ShapesJudge(), ShapesJudge())
    reward = WeightedReward({"shapes": (1.0, proxy), "brightness": (1.0, Brightness())})
    steps = ProxySteps(TrajectoryDataset(dataset), SAMPLER.size)
    return pprl_task("shapes", tiny_flux2(), train, SAMPLER, steps, reward)


def shapes(tree):
    return {dotted(path): (leaf.shape, leaf.dtype) for path, leaf in leaves_by_path(tree).items()}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_close(one, two, rtol):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(float(np.abs(b).max()), 1e-6))

    jax.tree.map(close, one, two)


@pytest.mark.slow
def test_what_the_policy_draws_is_what_the_pipeline_draws(dataset):
    task, pipe = shapes_task(dataset), tiny_flux2()
    step = next(step for step in task.steps.steps if step.kind == 1)
    noise = np.random.default_rng(0).normal(size=(2, *task.policy.latent_shape)).astype(np.float32)

    @jax.jit
    def draw(base, frozen, data, noise):
        conditions = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, 0), task.policy.encode_conditions(frozen, data))
        return task.policy.decode(frozen, task.policy.solve(task.policy.predictor(base, conditions), noise))

    drawn = draw(task.base, task.frozen, task.data([step]), noise)
    side = int(len(noise[0]) ** 0.5)
    expected = pipe(
        [step.text] * 2,
        [Image.fromarray(shown) for shown in task.steps.references(step)],
        num_inference_steps=SAMPLER.steps,
        guidance_scale=SAMPLER.guidance,
        latents=noise.reshape(2, side, side, -1).transpose(0, 3, 1, 2),
        output_type="np",
    ).images
    np.testing.assert_allclose(drawn, expected, atol=2e-4)
    assert task.bucket(step) == (1, encode_prompts(pipe.tokenizer, [step.text], (256,))[0].shape[1])


def test_a_long_history_loses_its_oldest_replies_here_as_in_the_pipeline(dataset):
    steps, pipe = ProxySteps(TrajectoryDataset(dataset), SAMPLER.size), tiny_flux2()
    step = max(steps.steps, key=lambda step: len(step.history))
    room = token_count(pipe.tokenizer, step.text) - 1
    pipe.settings = dataclasses.replace(pipe.settings, text_buckets=(room,))
    task = pprl_task("shapes", pipe, TRAIN, SAMPLER, steps, ProxyReward(ShapesJudge(), ShapesJudge()))
    data = task.data([step])
    assert task.bucket(step) == (len(step.history), room)
    assert data["ids"].shape == data["empty_ids"].shape == (1, room)
    read = pipe.tokenizer.decode(data["ids"][0][data["mask"][0].astype(bool)])
    assert f"{steps.prompt(step)}\n<IMG_GEN_1>" in read  # without the first reply
    assert f"<IMG_GEN_{len(step.history)}>\n{step.last_text.strip()}<|im_end|>" in read


@pytest.mark.slow
def test_flux2_in_the_shapes_world_from_roll_out_to_exported_folder(dataset, tmp_path):
    config = dataclasses.replace(TRAIN, epochs=2)
    task = shapes_task(dataset, config)
    state = rl.fit(task, config, tmp_path)
    first, second = metrics(tmp_path)
    assert first["reward_std"] > 0
    assert {
        "reward_step_0",
        "reward_step_1",
        "parts/shapes",
        "parts/shapes/i2i/success",
        "parts/shapes/i2i/preservation",
    } <= set(first)
    assert np.isfinite(list(second.values())).all()
    assert first["kl"] < 1e-9  # at the first update all policies are the same
    assert second["kl"] > first["kl"]
    assert (tmp_path / "samples" / "epoch_00001.png").exists()
    exported = nnx.state(Flux2Pipeline.from_pretrained(str(tmp_path / "export")).transformer)
    expected = config.policy_weights(task.base, state.ema)
    assert_close(nnx.to_pure_dict(exported), nnx.to_pure_dict(expected), 1e-2)  # bfloat16
    lora = load_lora(
        tmp_path / "export" / "lora", FLUX2_TRANSFORMER.key_mapping(tiny_flux2().transformer.config), task.base
    )
    assert_close(config.policy_weights(task.base, lora), expected, 1e-6)


@pytest.mark.slow
def test_recipes_bring_their_loop_and_say_what_they_lack(dataset, tmp_path):
    for name in ("pprl_shapes", "pprl_flux2", "pprl_sdxl"):
        recipe = load_recipe(ROOT / "configs" / f"{name}.py")
        assert recipe.fit is rl.fit
        assert (recipe.program is None) == (name == "pprl_shapes")
    with pytest.raises(ClvrError, match="pprl_shapes: nothing to plan"):
        plan(load_recipe(ROOT / "configs" / "pprl_shapes.py"), pprl_shapes.CONFIG, "cpu:1")
    with pytest.raises(ClvrError, match="--model is missing"):
        pprl_flux2.task(pprl_flux2.CONFIG)
    with pytest.raises(ClvrError, match="or --reward-url, where it is served"):
        pprl_flux2.task(dataclasses.replace(pprl_flux2.CONFIG, model="shapes-tiny-sft"))
    with pytest.raises(ClvrError, match="no trajectory dataset here"):
        pprl_shapes.task(dataclasses.replace(pprl_shapes.CONFIG, dataset=tmp_path))
    pipe = tiny_flux2()
    pipe.settings = dataclasses.replace(pipe.settings, is_distilled=True)
    steps = ProxySteps(TrajectoryDataset(dataset), SAMPLER.size)
    with pytest.raises(ClvrError, match="the model is distilled"):
        pprl_task("PPRL", pipe, TRAIN, SAMPLER, steps, ProxyReward(ShapesJudge(), ShapesJudge()))
    served = dataclasses.replace(pprl_flux2.CONFIG, model="shapes-tiny-sft", reward_url="http://localhost:1/v1")
    with pytest.raises(ClvrError, match="--proxy-prompt-url and --proxy-prompt-model go together"):
        pprl_flux2.task(dataclasses.replace(served, proxy_prompt_url="http://localhost:1/v1"))


def test_the_paper_s_numbers_are_the_preset_s():
    config = pprl_flux2.CONFIG
    train, sampler = config.train, config.sampler
    assert (train.lora.rank, train.lora.alpha, train.optimizer.learning_rate, train.group_size) == (
        128,
        256.0,
        1e-4,
        16,
    )
    assert (train.nft.kl_weight, sampler.steps, sampler.guidance, sampler.size) == (1e-5, 8, 4.0, 512)
    assert train.optimizer == AdamWConfig(1e-4, b1=0.9, b2=0.999, weight_decay=1e-4, clip_norm=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["klein-4b", "klein-9b"])
def test_the_programs_of_the_full_sizes_fit_together(preset):
    """Traced, not compiled: what the roll-out gives is what the update takes."""
    config = dataclasses.replace(pprl_flux2.CONFIG, preset=preset)
    rollout = pprl_flux2.program(config)
    update = pprl_flux2.program(dataclasses.replace(config, planned="update"))
    drawn = jax.eval_shape(rollout.function, rollout.weights, rollout.data)
    assert drawn.images.shape == (16, 512, 512, 3)
    assert update.data.samples.shape == drawn.samples.shape
    assert shapes(drawn.conditions) == shapes(update.data.conditions)
    sums = jax.eval_shape(update.function, update.weights, update.data)
    assert shapes(sums.grads) == shapes(update.weights["params"])
    trained = sum(leaf.size for leaf in jax.tree.leaves(update.weights["params"]))
    assert 0.02 < trained / sum(leaf.size for leaf in jax.tree.leaves(update.weights["base"])) < 0.15


def small_program(monkeypatch, planned, depth=1, steps=2):
    """`pprl_flux2` with small sizes in place of klein 4B's: the recipe, and its configuration."""
    recipe = load_recipe(ROOT / "configs" / "pprl_flux2.py")
    reader = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    sizes = dataclasses.replace(
        Flux2TransformerConfig.klein_4b(),
        num_layers=depth,
        num_single_layers=depth,
        num_attention_heads=2,
        joint_attention_dim=3 * reader.hidden_size,
    )
    monkeypatch.setitem(KLEIN, "klein-4b", (sizes, reader))
    train = dataclasses.replace(recipe.config.train, lora=LoRAConfig(4, targets=LORA_TARGETS))
    sampler = Sampler(steps=steps, size=32)
    return recipe, dataclasses.replace(recipe.config, planned=planned, sampler=sampler, train=train)


@pytest.mark.slow
@pytest.mark.parametrize("planned", ["rollout", "update"])
def test_programs_do_not_grow_with_layers_and_steps(monkeypatch, planned):
    """Both are loops in them, so that compilers have one body to work on."""

    def operations(depth, steps):
        recipe, config = small_program(monkeypatch, planned, depth, steps)
        program = recipe.program(config)
        return jax.jit(program.function).lower(program.weights, program.data).as_text().count("stablehlo.")

    # Of sizes that are not special: one layer needs no slice, and what is random about a few steps is written out.
    assert operations(2, 8) == operations(4, 12)


@pytest.mark.slow
@pytest.mark.parametrize("planned", ["rollout", "update"])
def test_both_programs_are_planned_with_one_group_on_eight_devices(monkeypatch, planned):
    """Of small sizes; the full ones take the compiler some minutes."""
    recipe, config = small_program(monkeypatch, planned)
    report = plan(recipe, config, "cpu:8")
    assert planned in report.name
    assert report.memory.fits
    with pytest.raises(UsageError, match="4 rows cannot be sharded into 8 parts"):
        plan(recipe, dataclasses.replace(config, train=dataclasses.replace(config.train, group_size=4)), "cpu:8")
