"""Distillation into few steps: facts about fields that are known, and the recipe on a very small pipeline."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from clvr_jax.configs import flux2_distill
from clvr_jax.data.preprocessing.text import encode_prompts
from clvr_jax.diffusion import euler_solve, flow_sigmas
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.programs import velocity_field
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks.flux2 import pipeline_distill_task
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.objectives.distillation import (
    DistillConfig,
    Windows,
    distillation_loss,
    follow_windows,
    window_loss,
)
from clvr_jax.training.optimization.step import TrainState, make_train_step
from clvr_jax.training.recipes import load_recipe
from clvr_jax.training.trainer import Task, TrainConfig, fit
from clvr_jax.trees import leaves_by_path
from tests.helpers.models import small_flux2

SIGMAS = flow_sigmas(4, 16)
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 5)), jnp.float32)
NOBODY = jnp.zeros(6, bool)
X0 = 2.0


def straight(x, sigma):
    """The field whose every path leads to X0 in a straight line: x_sigma = (1 - sigma) X0 + sigma noise."""
    return (x - X0) / sigma


def curved(x, sigma):
    return x * (1 + sigma)


def test_the_last_window_ends_where_pictures_are():
    path = follow_windows(straight, straight, NOISE, NOBODY, SIGMAS, 8)
    assert SIGMAS[-1] == 0
    assert path.starts.shape == path.ends.shape == (6, 4, 3, 5)
    np.testing.assert_array_equal(path.starts[:, 0], NOISE)
    np.testing.assert_allclose(path.ends[:, -1], X0, atol=1e-5)


def test_a_straight_field_has_nothing_to_learn():
    path = follow_windows(straight, straight, NOISE, NOBODY, SIGMAS, 8)
    for number in range(3):
        loss, _ = window_loss(lambda x, t: straight(x, t[:, None, None]), path, SIGMAS, jax.random.key(number), 0.5)
        assert loss < 1e-9


def test_windows_join_to_the_teachers_path_in_small_steps():
    path = follow_windows(curved, straight, NOISE, NOBODY, SIGMAS, 8)
    fine = np.concatenate([np.linspace(a, b, 9)[:-1] for a, b in itertools.pairwise(SIGMAS)] + [[0.0]])
    np.testing.assert_allclose(path.ends[:, -1], euler_solve(curved, NOISE, jnp.asarray(fine)), rtol=1e-5)
    np.testing.assert_array_equal(path.starts[:, 1:], path.ends[:, :-1])


def test_rows_of_the_student_begin_where_its_own_steps_lead():
    own = jnp.asarray([True, False] * 3)
    path = follow_windows(curved, straight, NOISE, own, SIGMAS, 2)
    for window in range(4):
        sampled = euler_solve(straight, NOISE, jnp.asarray(SIGMAS[: window + 1]))
        np.testing.assert_allclose(path.starts[own, window], sampled[own], rtol=1e-5)
    np.testing.assert_array_equal(path.starts[~own, 1:], path.ends[~own, :-1])
    # From wherever a row is, the teacher leads it through the window.
    expected = euler_solve(curved, path.starts[:, 2], jnp.linspace(SIGMAS[2], SIGMAS[3], 3))
    np.testing.assert_allclose(path.ends[:, 2], expected, rtol=1e-5)


def test_the_loss_is_the_distance_to_the_straight_way_through_each_window():
    rng = np.random.default_rng(1)
    path = Windows(*(jnp.asarray(rng.normal(size=(6, 4, 3, 5)), jnp.float32) for _ in range(2)))
    seen = {}

    def zero(x, t):
        seen.update(x=x.reshape(6, 4, 3, 5), t=t.reshape(6, 4))
        return jnp.zeros_like(x)

    loss, parts = window_loss(zero, path, SIGMAS, jax.random.key(0), 0.5)
    slopes = (path.ends - path.starts) / np.diff(SIGMAS)[:, None, None]
    np.testing.assert_allclose(loss, np.mean(slopes**2), rtol=1e-5)
    np.testing.assert_allclose(parts["loss_window_2"], np.mean(slopes[:, 2] ** 2), rtol=1e-5)
    # What is asked lies on the line, at its start half the time (24 draws).
    t = np.asarray(seen["t"])
    assert ((SIGMAS[1:] < t) & (t <= SIGMAS[:-1])).all()
    assert 4 <= (t == SIGMAS[:-1]).sum() <= 20
    passed = (t - SIGMAS[:-1])[..., None, None]
    np.testing.assert_allclose(seen["x"], path.starts + passed * slopes, atol=1e-4)
    for share, count in ((1.0, 24), (0.0, 0)):
        window_loss(zero, path, SIGMAS, jax.random.key(0), share)
        assert (np.asarray(seen["t"]) == SIGMAS[:-1]).sum() == count


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_is_in_the_target_and_only_the_student_is_differentiated(guidance):
    """velocity = weight * condition, so that the guided one is weight * (u + g (c - u)), whatever the state."""

    def network(weights):
        return lambda x, t, condition: weights * condition["c"][:, None, None] * jnp.ones_like(x)

    c, u = jnp.arange(1.0, 7.0), jnp.full(6, 0.5)
    config = DistillConfig(guidance=guidance, substeps=2)

    def loss(params, teacher):
        return distillation_loss(
            network, params, teacher, {"c": c}, {"c": u}, NOISE, SIGMAS, config, jax.random.key(3)
        )[0]

    student, teacher = 0.3, 0.7
    target = teacher * np.asarray(c if guidance == 1 else u + guidance * (c - u))
    difference = student * np.asarray(c) - target
    np.testing.assert_allclose(loss(student, teacher), np.mean(difference**2), rtol=1e-4)
    slope = jax.grad(loss)(student, teacher)
    np.testing.assert_allclose(slope, np.mean(2 * difference * np.asarray(c)), rtol=1e-3)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"substeps": 0}, {"guidance": 0.5}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match="at least 1"):
        DistillConfig(**wrong)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_within_0_and_1(share):
    with pytest.raises(UsageError, match="start_share must be in"):
        DistillConfig(start_share=share)


TRAIN = TrainConfig(
    steps=6,
    learning_rate=1e-2,
    log_every=1,
    checkpoint=CheckpointConfig(save_interval_minutes=1000),
    mesh=MeshConfig(devices=1),
)


def toy_task():
    """Velocity = tokens @ kernel + condition @ kernel; the student begins as the teacher."""
    rng = np.random.default_rng(0)
    kernels = {name: {"kernel": jnp.asarray(0.3 * rng.normal(size=(8, 8)), jnp.float32)} for name in ("inner", "outer")}

    def network(weights):
        def field(x, t, condition):
            at = condition["c"][:, None, :] * t[:, None, None]
            return x @ weights["inner"]["kernel"] + at @ weights["outer"]["kernel"]

        return field

    def loss(params, frozen, batch, key):
        noise = jax.random.normal(jax.random.fold_in(key, 1), (16, 4, 8))
        empty = {"c": jnp.zeros_like(batch["c"])}
        return distillation_loss(
            network, params, frozen["teacher"], batch, empty, noise, SIGMAS, DistillConfig(substeps=3), key
        )

    def batches(step):
        return {"c": np.random.default_rng(step).normal(size=(16, 8)).astype(np.float32)}

    return Task("toy", kernels, {"teacher": kernels}, loss, batches, lambda ema, folder: None)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit_and_eight_devices_compute_the_same(tmp_path):
    whole = fit(toy_task(), TRAIN, tmp_path / "whole")
    fit(toy_task(), TRAIN, tmp_path / "parts", stop_after=3)
    parts = fit(toy_task(), TRAIN, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert jax.tree.all(jax.tree.map(np.array_equal, parts.params, whole.params))
    mesh = dataclasses.replace(TRAIN, mesh=MeshConfig(data=2, fsdp=4))
    fit(toy_task(), mesh, tmp_path / "mesh")
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "whole"), rtol=1e-4)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]


def test_a_teacher_may_compute_another_function_of_its_weights():
    def network(sign):
        return lambda weights: lambda x, t, condition: sign * weights * jnp.ones_like(x)

    config = DistillConfig(guidance=1.0, substeps=1)
    loss, _ = distillation_loss(
        network(1), 0.3, 0.7, {}, {}, NOISE, SIGMAS, config, jax.random.key(3), teacher_network=network(-1)
    )
    np.testing.assert_allclose(loss, (0.3 + 0.7) ** 2, rtol=1e-4)


def batches(step):
    rng = np.random.default_rng(step)
    return {
        "ids": rng.integers(0, 600, (2, 28)).astype(np.int32),
        "mask": np.ones((2, 28), np.int32),
        "references": rng.integers(0, 255, (2, 1, 64, 64, 3)).astype(np.uint8),
        "target": np.zeros((2, 64, 64, 3), np.uint8),
    }


@pytest.mark.slow
def test_only_references_are_attended_to_in_another_way_than_by_the_teacher():
    """Without references a student with cached ones has the same loss; with them it has another."""
    pipe, distill = small_flux2("shapes-tiny-base"), DistillConfig(substeps=1, guidance=1.0)
    tasks = [
        pipeline_distill_task("tiny", pipe, TRAIN, distill, batches, reference_cache=mode) for mode in (None, "loop")
    ]

    def loss(task, count):
        data = batches(0)
        data["references"] = data["references"][:, :count]
        return float(task.loss(task.params, task.frozen, data, jax.random.key(0))[0])

    assert loss(tasks[0], 0) == loss(tasks[1], 0)
    assert abs(loss(tasks[0], 1) - loss(tasks[1], 1)) > 1e-4


@pytest.mark.slow
def test_a_distilled_model_teaches_itself_to_attend_to_references_in_another_way(tmp_path):
    train = dataclasses.replace(TRAIN, steps=1)
    pipe = small_flux2("shapes-tiny")
    distill = DistillConfig(substeps=1, guidance=1.0)
    task = pipeline_distill_task("tiny", pipe, train, distill, batches, save_dtype="float32", reference_cache="loop")
    fit(task, train, tmp_path)
    student = Flux2Pipeline.from_pretrained(str(tmp_path / "export"))
    assert (student.settings.reference_cache, student.settings.is_distilled) == ("loop", True)


@pytest.mark.slow
def test_a_run_gives_a_folder_that_draws_in_four_steps_on_the_levels_it_learned_at(tmp_path):
    train, teacher = dataclasses.replace(TRAIN, steps=2), small_flux2("shapes-tiny-base")
    distill = DistillConfig(substeps=2, guidance=1.7)
    fit(pipeline_distill_task("tiny", teacher, train, distill, batches, save_dtype="float32"), train, tmp_path)
    assert json.loads((tmp_path / "export" / "model_index.json").read_text())["is_distilled"] is True
    student = Flux2Pipeline.from_pretrained(str(tmp_path / "export"))
    assert (student.settings.num_inference_steps, student.settings.guidance_scale) == (4, 1.0)
    # The student's parameters are the teacher's in name and shape: a difference of weights exists.
    ours, theirs = (leaves_by_path(nnx.state(pipe.transformer)) for pipe in (student, teacher))
    assert {path: leaf.shape for path, leaf in ours.items()} == {path: leaf.shape for path, leaf in theirs.items()}
    assert any((ours[path] != theirs[path]).any() for path in ours)
    with pytest.raises(ClvrError, match="distilled already; give its base, or another --reference-cache than none"):
        pipeline_distill_task("tiny", student, train, distill, batches)
    other = {"kernel": jnp.zeros(3)}
    with pytest.raises(ClvrError, match="not of the teacher's architecture"):
        pipeline_distill_task("tiny", teacher, train, distill, batches, student=other)
    with pytest.raises(ClvrError, match=r"with --distill\.guidance 1"):
        pipeline_distill_task("tiny", student, train, distill, batches, reference_cache="loop")
    # A path of one substep, all of it the student's, ends in the picture that the pipeline draws of the same noise.
    latents = np.random.default_rng(5).normal(size=(1, 32, 4, 4)).astype(np.float32)
    drawn = student("a red circle", latents=latents, output_type="np", guidance_scale=9.0)  # guidance is baked in
    assert drawn.nfe == 4
    ids, mask = encode_prompts(student.tokenizer, ["a red circle"], student.settings.text_buckets)

    graphdefs, states = zip(*map(nnx.split, (student.text_encoder, student.transformer, student.vae)), strict=True)

    @jax.jit
    def draw(states, noise):
        text_encoder, transformer, vae = map(nnx.merge, graphdefs, states)
        text = jnp.concatenate(text_encoder.hidden_states(ids, mask, student.settings.text_encoder_out_layers), -1)
        field = velocity_field(transformer, jnp.zeros((1, 0, 32)), (4, 4), [])

        def velocity(x, sigma):
            return field(x, jnp.full(1, sigma), text)

        path = follow_windows(velocity, velocity, noise, jnp.ones(1, bool), SIGMAS, 1)
        return vae.decode_tokens(path.ends[:, -1].reshape(1, 4, 4, -1)) / 2 + 0.5

    again = draw(states, latents.reshape(1, 32, 16).swapaxes(1, 2))
    np.testing.assert_allclose(np.clip(again, 0, 1), drawn.images, atol=2e-4)


def test_a_model_must_be_named():
    with pytest.raises(ClvrError, match="--model is missing"):
        flux2_distill.task(flux2_distill.CONFIG)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["klein-4b", "klein-9b"])
def test_the_step_of_the_real_model_has_the_shapes_of_its_state(preset):
    recipe = load_recipe("configs/flux2_distill.py")  # as clvr plan does
    config = dataclasses.replace(recipe.config, preset=preset, batch_size=2, size=128, references=1)
    task = recipe.abstract_task(config)
    optimizer = config.train.optimizer()
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), task.params)
    following, metrics = jax.eval_shape(
        make_train_step(task.loss, optimizer, config.train.step), state, task.frozen, task.batches(0)
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), following) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {name for name in metrics if name.startswith("loss_window")} == {f"loss_window_{n}" for n in range(4)}
    # 64 evaluations of the teacher and 4 of the student on its way, 2 FLOPs for each parameter and token; 12 to learn.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    rate = task.flops(task.batches(0)) / (2 * parameters * task.tokens(task.batches(0)))
    assert 0.7 < rate / (64 + 4 + 12) < 1.8
