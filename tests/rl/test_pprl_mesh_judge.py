"""A reward model on the devices that train: the same marks, and so the same run, however the devices are cut."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.providers.local import MeshChatModel
from clvr_jax.rewards import MeshReward, UnifiedReward, UnifiedRewardEdit
from clvr_jax.rl import fit
from clvr_jax.sharding import MeshConfig, MeshLayout
from clvr_jax.tasks.reward_options import RewardOptions, make_reward
from tests.rl.pprl_toy import changed, judged_on_the_mesh, make_task

ROOT = Path(__file__).parents[2]
EPOCHS = 2


@pytest.fixture(scope="module")
def judge(small_qwen3_vl):
    return small_qwen3_vl


def trained(dataset, judge, out, mesh, proxy_prompt_generator=None):
    """A run on a mesh, and its metrics."""
    config = changed(epochs=EPOCHS, mesh=mesh)
    with MeshLayout(mesh.make()).active():
        task = make_task(dataset, config, judged_on_the_mesh(judge))
        state = fit(dataclasses.replace(task, proxy_prompt_generator=proxy_prompt_generator), config, out)
    return state, rows(out)


@pytest.fixture(scope="module")
def alone(dataset, judge, tmp_path_factory):
    return trained(dataset, judge, tmp_path_factory.mktemp("alone"), MeshConfig(devices=1))


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in ("reward", "parts/t2i", "parts/i2i", "loss"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4)


@pytest.mark.slow
def test_a_judge_spread_over_eight_devices_gives_the_marks_of_one(dataset, judge, alone, tmp_path):
    state, found = trained(dataset, judge, tmp_path, MeshConfig(fsdp=4, tensor=2))
    assert found[0]["reward_std"] > 0.05  # pictures of a group are told apart
    assert found[0]["dropped_samples"] == 0
    assert found[0]["seconds_reward"] > 0
    assert_same_run(found, alone[1])
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4 * np.abs(other).max()),
        state.params,
        alone[0].params,
    )


@pytest.mark.slow
def test_its_proxies_may_be_written_live(dataset, judge, tmp_path):
    """Those of the dataset, but for a step for which the generator writes nothing of use."""
    lost = make_task(dataset).steps.sample(0, changed().prompts_per_epoch, changed().seed)[0]

    def write_proxies(step):
        if step == lost:
            raise AnswerError("no JSON object")
        return step.proxies

    _, found = trained(dataset, judge, tmp_path, MeshConfig(devices=1), write_proxies)
    assert (found[0]["dropped_groups"], found[0]["dropped_samples"]) == (1, changed().group_size)


@pytest.mark.slow
def test_two_processes_judge_together(dataset, judge, alone, tmp_path):
    cluster = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), "--processes", "2", "--devices", "1"]
    command = [*cluster, str(Path(__file__).with_name("pprl_recipe.py")), "--out", str(tmp_path / "run")]
    options = ["--dataset", str(dataset), "--judge", str(judge), "--train.epochs", str(EPOCHS)]
    mesh = ["--train.mesh.devices", "None", "--train.mesh.fsdp", "2"]
    done = subprocess.run(
        [*command, *options, *mesh],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert_same_run(rows(tmp_path / "run"), alone[1])


@pytest.mark.slow
def test_a_judge_whose_answers_cannot_be_read_ends_the_run_with_its_state_kept(dataset, judge, tmp_path):
    model = MeshChatModel(Qwen3VLPipeline.from_pretrained(judge), "judge", batch=8)
    reward = MeshReward(UnifiedReward(model, max_tokens=2), UnifiedRewardEdit(model, max_tokens=2))
    task = make_task(dataset, changed(epochs=1), reward)
    message = r"epoch 1 cannot be scored .*none of .* replies .* can be parsed.*epoch 0 is saved"
    with pytest.raises(ClvrError, match=message):
        fit(task, changed(epochs=1), tmp_path)


def test_the_recipe_says_who_judges(judge):
    def reward(**options):
        return make_reward("pprl_flux2", RewardOptions(**options), "float32", batch_size=16)

    with pytest.raises(ClvrError, match=r"judge is missing; give either --judge.* or --reward-url"):
        reward()
    with pytest.raises(ClvrError, match="judge is missing"):
        reward(judge=str(judge), reward_url="http://localhost:1/v1")
    with pytest.raises(ClvrError, match="give --edit-judge for a judge of edits"):
        reward(judge=str(judge))
    simple = reward(judge=str(judge), simple=True)
    assert isinstance(simple, MeshReward)
    assert not reward(reward_url="http://localhost:1/v1").runs_on_devices
