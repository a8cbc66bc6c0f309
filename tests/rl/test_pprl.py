"""The loop of Proxy Prompt RL: what an update depends on and what not, and how a run ends and goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.diffusion import FlowProcess
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import read_image
from clvr_jax.interfaces import ProviderError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.rl import NFTConfig, RandomSource, RolloutBatch, UpdateBatch, collect_rollout, fit, loss_and_grads
from clvr_jax.rl.algorithms.diffusion_nft import old_decay
from clvr_jax.sharding import MeshConfig, MeshLayout
from clvr_jax.training.checkpoint import restore_part
from clvr_jax.training.recipes import export_run
from tests.rl.pprl_toy import CONFIG, Brightness, changed, make_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """A run of four epochs: its folder and final state."""
    out = tmp_path_factory.mktemp("undisturbed")
    return out, fit(make_task(dataset), CONFIG, out)


def rows(out):
    """Metrics without what a clock says."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in found]


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_close(one, two, rtol):
    """Leaf by leaf, relative to the leaf's largest entry."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(float(np.abs(b).max()), 1e-6))

    jax.tree.map(close, one, two)


def microbatch_grads(dataset, config=CONFIG, optimality=None, valid_mask=None):
    """Gradients of a microbatch of two groups at theta = old, as the update sums them up."""
    task = make_task(dataset, config)
    steps = task.steps.steps[:2]
    params = task.params
    source = RandomSource(np.int32(0), np.int32(0), np.array([s.number for s in steps]))
    batch = RolloutBatch(task.data(steps), source)
    with MeshLayout(MeshConfig(devices=1).make()).active():
        rollout = jax.jit(partial(collect_rollout, task.policy, config))(task.base, params, task.frozen, batch)
        update_batch = UpdateBatch(
            samples=rollout.samples,
            conditions=rollout.conditions,
            sample_weights=jnp.full(config.microbatch_size, 0.5) if optimality is None else jnp.asarray(optimality),
            valid_mask=jnp.ones(config.microbatch_size) if valid_mask is None else jnp.asarray(valid_mask),
            inner_step=np.int32(0),
            source=source,
        )
        return jax.jit(partial(loss_and_grads, task.policy, config))(params, task.base, params, update_batch)


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))


@pytest.mark.slow
def test_equal_rewards_pull_nowhere(dataset, tmp_path):
    config = changed(groups_per_microbatch=2, nft=NFTConfig(kl_weight=0.0))
    unequal = np.random.default_rng(0).random(config.microbatch_size).astype(np.float32)
    assert norm(microbatch_grads(dataset, config).grads) < 1e-5 * norm(microbatch_grads(dataset, config, unequal).grads)
    fit(make_task(dataset, changed(epochs=1), Brightness(lambda case, value: 0.7)), changed(epochs=1), tmp_path)
    (row,) = rows(tmp_path)
    assert row["zero_variance_groups"] == CONFIG.prompts_per_epoch
    assert row["reward_std"] < 1e-9


def test_samples_that_do_not_count_teach_nothing(dataset):
    config = changed(groups_per_microbatch=2)
    rng = np.random.default_rng(1)
    good, valid = rng.random(config.microbatch_size).astype("f"), (rng.random(config.microbatch_size) < 0.5).astype("f")
    other = np.where(valid, good, 1 - good)
    one, two = (microbatch_grads(dataset, config, values, valid) for values in (good, other))
    assert_same(one, two)
    assert float(one.weight) == valid.sum()


def test_the_order_in_which_steps_are_chosen_changes_nothing(dataset, undisturbed, tmp_path):
    task = make_task(dataset)
    straight = task.steps.sample
    task.steps.sample = lambda *given: straight(*given)[::-1]
    assert_same(fit(task, CONFIG, tmp_path), undisturbed[1])


@pytest.mark.slow
def test_groups_that_share_a_microbatch_and_padding_change_nothing_but_rounding(dataset, undisturbed, tmp_path):
    config = changed(groups_per_microbatch=4, updates_per_epoch=1, epochs=2)
    single = changed(updates_per_epoch=1, epochs=2)
    many = fit(make_task(dataset, config), config, tmp_path / "many")
    one = fit(make_task(dataset, single), single, tmp_path / "one")
    assert_close(many.params, one.params, 2e-4)
    assert_close(many.old, one.old, 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_eight_devices_are_one(dataset, undisturbed, tmp_path, mesh):
    config = changed(mesh=mesh)
    state = fit(make_task(dataset, config), config, tmp_path)
    assert_close(state.params, undisturbed[1].params, 2e-4)
    for found, expected in zip(rows(tmp_path), rows(undisturbed[0]), strict=True):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(found["reward"], expected["reward"], rtol=1e-4)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_run_that_stopped_and_went_on_is_the_run_that_did_not(dataset, undisturbed, tmp_path):
    fit(make_task(dataset), CONFIG, tmp_path, stop_after=2)
    assert not (tmp_path / "export").exists()
    with pytest.raises(UsageError, match="--resume"):
        fit(make_task(dataset), CONFIG, tmp_path)
    assert_same(fit(make_task(dataset), CONFIG, tmp_path, resume=True), undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])
    exported = [np.load(out / "export" / "weights.npz") for out in (tmp_path, undisturbed[0])]
    assert_same(dict(exported[0]), dict(exported[1]))


def test_what_is_left_behind(dataset, undisturbed):
    out, state = undisturbed
    assert (int(state.epoch), int(state.step), int(state.skipped)) == (4, 8, 0)
    first = rows(out)[0]
    assert {"reward", "reward_t2i", "reward_i2i", "reward_step_0", "reward_step_1", "parts/brightness"} <= set(first)
    assert {"kl", "norm_ratio", "loss", "grad_norm", "zero_variance_groups", "dropped_samples"} <= set(first)
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["epoch_00002.png", "epoch_00004.png"]
    assert read_image(out / "samples" / "epoch_00002.png").shape == (6 * 4, 8 * 4, 3)
    times = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    parts = [times[f"seconds_{name}"] for name in ("sampling", "reward", "update", "outside")]
    assert sum(parts) == pytest.approx(times["seconds"])
    # The export is the base with the average, which is what the checkpoint holds as such.
    task = make_task(dataset)
    ema, epoch = restore_part(out / "checkpoints", "ema", task.params)
    assert epoch == 4
    assert_same(ema, state.ema)
    weights = CONFIG.policy_weights(task.base, ema)
    assert_close(dict(np.load(out / "export" / "weights.npz"))["inner"], weights["inner"]["kernel"], 1e-6)


def test_the_policy_that_samples_follows_the_one_that_trains(dataset, tmp_path):
    config = changed(epochs=1)
    task = make_task(dataset, config)
    state = fit(task, config, tmp_path)
    d = float(old_decay(2))
    expected = jax.tree.map(lambda start, now: d * start + (1 - d) * now, task.params, state.params)
    assert_close(state.old, expected, 1e-6)
    assert norm(jax.tree.map(jnp.subtract, state.params, task.params)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [3, 0])
def test_the_reward_rises(dataset, tmp_path, rank):
    """With a LoRA, and with all parameters."""
    config = changed(
        epochs=14,
        lora={"rank": rank},
        updates_per_epoch=1,
        timesteps_per_sample=4,
        optimizer={"learning_rate": 1e-2},
        group_size=16,
    )
    fit(make_task(dataset, config), config, tmp_path)
    means = [row["reward"] for row in rows(tmp_path)]
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.05


@pytest.mark.slow
def test_rewards_that_are_missing_drop_their_samples(dataset, tmp_path):
    """Those of one step altogether, one of another; not a number or infinite, it is the same."""
    config = changed(epochs=1)
    lost = make_task(dataset).steps.sample(0, CONFIG.prompts_per_epoch, CONFIG.seed)[0]
    states = []
    for place, missing in enumerate((np.nan, np.inf, -np.inf)):
        seen = []

        def spoil(case, value, missing=missing, seen=seen):
            if case.last_text == lost.last_text:
                return missing
            seen.append(case)
            return missing if np.mean(case.image) > 150 else value

        out = tmp_path / str(place)
        states.append(fit(make_task(dataset, config, Brightness(spoil)), config, out))
        (row,) = rows(out)
        assert row["dropped_groups"] == 1
        assert CONFIG.group_size <= row["dropped_samples"] < CONFIG.prompts_per_epoch * CONFIG.group_size
        assert np.isfinite(list(row.values())).all()
    assert_same(states[0].params, states[1].params)
    assert_same(states[0].params, states[2].params)


@pytest.mark.slow
def test_proxies_of_a_generator_are_those_that_are_rewarded_and_kept(dataset, tmp_path):
    """One step's cannot be had: its group drops out, the others are as with the dataset's own."""
    config = changed(epochs=2)
    task = make_task(dataset, config)
    lost = task.steps.sample(0, config.prompts_per_epoch, config.seed)[0]
    asked = []

    def write_proxies(step):
        asked.append(step.number)
        if step == lost:
            raise AnswerError("no JSON object")
        return ProxyPrompts(f"live {step.number}", step.proxies.p_i2i, step.proxies.i_ref)

    out = tmp_path / "run"
    live = dataclasses.replace(task, proxy_prompt_generator=write_proxies)
    fit(live, config, out, stop_after=1)
    fit(dataclasses.replace(live, reward=Brightness()), config, out, resume=True)
    assert {case.proxies.p_t2i.split()[0] for case in task.reward.cases} == {"live"}
    assert len(task.reward.cases) == (config.prompts_per_epoch - 1) * config.group_size
    first, second = rows(out)
    assert (first["dropped_groups"], first["dropped_samples"]) == (1, config.group_size)
    again = [number for number in set(asked) if asked.count(number) > 1]
    assert again in ([], [lost.number])
    assert second["reward"] > 0


def test_an_epoch_without_any_reward_ends_the_run_with_its_state_kept(dataset, tmp_path):
    task = make_task(dataset, reward=Brightness(lambda case, value: np.nan))
    with pytest.raises(ClvrError, match=r"epoch 1 cannot be scored .*none of 48 samples.*epoch 0 is saved") as caught:
        fit(task, CONFIG, tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]


@pytest.mark.slow
def test_an_endpoint_that_dies_ends_the_run_and_the_rest_is_as_if_it_had_not(dataset, undisturbed, tmp_path):
    def spoil(case, value):
        if len(dying.cases) > 2.5 * CONFIG.prompts_per_epoch * CONFIG.group_size:
            raise ProviderError("judge (localhost): cannot be reached (after 5 retries)", "down")
        return value

    dying = Brightness(spoil)
    with pytest.raises(ClvrError, match=r"epoch 3 cannot be scored \(judge .*epoch 2 is saved, --resume continues"):
        fit(make_task(dataset, reward=dying), CONFIG, tmp_path)
    assert_same(fit(make_task(dataset), CONFIG, tmp_path, resume=True), undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_drops_the_epoch_it_is_in(dataset, undisturbed, tmp_path, capfd):
    def spoil(case, value):
        if len(asking.cases) > 1.2 * CONFIG.prompts_per_epoch * CONFIG.group_size and not asking.asked:
            asking.asked = True
            os.kill(os.getpid(), signal.SIGTERM)
        return value

    asking = Brightness(spoil)
    asking.asked = False
    state = fit(make_task(dataset, reward=asking), CONFIG, tmp_path)
    stopped = int(state.epoch)
    assert stopped < 4
    assert f"asked to stop; epoch {stopped} is saved" in capfd.readouterr().err
    assert_same(fit(make_task(dataset), CONFIG, tmp_path, resume=True), undisturbed[1])


def test_gradients_that_are_not_finite_change_nothing_and_many_end_the_run(dataset, tmp_path):
    config = changed(optimizer={"learning_rate": 1e-3}, max_nonfinite_steps=3)
    task = make_task(dataset, config)

    class Poisoned(FlowProcess):
        def corrupt(self, x0, noise, t):
            return super().corrupt(x0, noise, t) * jnp.nan

    poisoned = dataclasses.replace(task.policy, forward_process=Poisoned())
    with pytest.raises(ClvrError, match="4 steps in a row are not finite, up to epoch 2"):
        fit(dataclasses.replace(task, policy=poisoned), config, tmp_path)


def test_another_lora_is_refused(dataset, undisturbed):
    out, _ = undisturbed
    for other in (changed(lora={"rank": 5}), changed(lora={"alpha": 6.0}), changed(lora={"rank": 0})):
        with pytest.raises(ClvrError, match=r"begun with .*'lora_rank': 3.* this run has") as caught:
            fit(make_task(dataset, other), other, out, resume=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size is 1"),
        ({"updates_per_epoch": 0, "epochs": 0}, "epochs, updates_per_epoch must be at least 1"),
        ({"lora": {"rank": -1}}, "rank must be at least 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        changed(**options)


def test_a_microbatch_that_cannot_be_sharded_and_too_many_groups_are_refused(dataset, tmp_path):
    config = changed(group_size=6, mesh=MeshConfig(fsdp=8))
    with pytest.raises(UsageError, match="6 rows cannot be sharded into 8 parts"):
        fit(make_task(dataset, config), config, tmp_path / "a")
    config = changed(prompts_per_epoch=900)
    with pytest.raises(UsageError, match="steps can be used, 900 are requested"):
        fit(make_task(dataset, config), config, tmp_path / "b")


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_run_and_any_run_is_exported_later(dataset, undisturbed, tmp_path):
    recipe = Path(__file__).with_name("pprl_recipe.py")
    cluster = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), "--processes", "2", "--devices", "4"]
    command = [*cluster, str(recipe), "--out", str(tmp_path / "run"), "--dataset", str(dataset)]
    options = ["--train.mesh.devices", "None", "--train.mesh.fsdp", "8"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    for found, expected in zip(rows(tmp_path / "run"), rows(undisturbed[0]), strict=True):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(found["reward"], expected["reward"], rtol=1e-4)
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)
    assert export_run(tmp_path / "run", tmp_path / "again") == 4
    exported = [dict(np.load(folder / "weights.npz")) for folder in (tmp_path / "again", tmp_path / "run" / "export")]
    assert_close(*exported, 1e-6)
