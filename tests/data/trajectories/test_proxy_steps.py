"""Tests of the steps for which images are generated: the paper's mixture, and histories."""

from collections import Counter

import numpy as np
import pytest

from clvr_jax.data.trajectories.dataset import TrajectoryDataset, write_dataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.data.trajectories.record import ProxyPrompts, TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory


def gray(value, height=8, width=8):
    return np.full((height, width, 3), value, np.uint8)


def record(name, count, rolled_back=None, size=(8, 8)):
    """Returns a record of `count` images with proxy prompts, each an edit of the previous one."""
    steps, proxies = [], []
    for number in range(count):
        is_back = number == rolled_back
        steps.append(Step(f"reply {number}", IMAGE_GEN, (), gray(10 * number, *size), rolled_back=is_back))
        proxies.append(ProxyPrompts(f"whole {number}", *([f"edit {number}", (number - 1,)] if number else [])))
    trajectory = Trajectory(f"prompt {name}", (*steps, Step("done", TERMINATE)), "accepted")
    return TrajectoryRecord(name, trajectory, proxies=(*proxies, None))


def steps_of(directory, records, size=8):
    write_dataset(directory, records)
    return ProxySteps(TrajectoryDataset(directory), size)


def test_half_of_the_steps_are_first_images_and_kinds_of_edits_are_equally_frequent(tmp_path):
    steps = steps_of(tmp_path / "d", [record(f"r{n}", 7) for n in range(6)])
    assert Counter(step.kind for step in steps.steps) == {0: 6, 1: 6, 2: 6, 3: 6, 4: 18}
    for epoch in range(3):
        sampled = steps.sample(epoch, 8, seed=0)
        assert Counter(step.kind for step in sampled) == {0: 4, 1: 1, 2: 1, 3: 1, 4: 1}
        assert len({step.number for step in sampled}) == 8
    few = [step.kind for epoch in range(8) for step in steps.sample(epoch, 3, seed=0)]
    assert Counter(few) == {0: 12, 1: 3, 2: 3, 3: 3, 4: 3}


def test_the_steps_of_an_epoch_depend_on_seed_and_epoch(tmp_path):
    steps = steps_of(tmp_path / "d", [record(f"r{n}", 3) for n in range(8)])
    assert steps.sample(3, 6, seed=1) == steps.sample(3, 6, seed=1)
    assert steps.sample(3, 6, seed=1) != steps.sample(4, 6, seed=1) != steps.sample(4, 6, seed=2)


def test_other_edits_replace_missing_ones(tmp_path):
    steps = steps_of(tmp_path / "d", [record(f"r{n}", 2) for n in range(8)])
    assert Counter(step.kind for step in steps.sample(0, 8, seed=0)) == {0: 4, 1: 4}
    everything = steps.sample(0, 16, seed=0)
    assert {step.number for step in everything} == set(range(16))
    with pytest.raises(UsageError, match="16 steps can be used, 17 are requested"):
        steps.sample(0, 17, seed=0)


def test_rolled_back_steps_are_neither_sampled_nor_history(tmp_path):
    steps = steps_of(tmp_path / "d", [record("r", 4, rolled_back=1)])
    assert [step.history for step in steps.steps] == [(), (0,), (0, 2)]
    last = steps.steps[-1]
    assert last.text == "prompt r\nreply 0<IMG_GEN_1>\nreply 2<IMG_GEN_2>\nreply 3"
    assert last.last_text == "reply 3"
    assert [shown[0, 0, 0] for shown in steps.references(last)] == [0, 20]
    assert [shown[0, 0, 0] for shown in steps.sources(last, last.proxies)] == [20]


def test_steps_with_equal_texts_are_different_groups(tmp_path):
    steps = steps_of(tmp_path / "d", [record("same", 1), record("same", 1)])
    assert steps.steps[0].text == steps.steps[1].text
    assert steps.steps[0].number != steps.steps[1].number


def test_images_are_scaled_to_the_generated_size(tmp_path):
    steps = steps_of(tmp_path / "d", [record("r", 2, size=(16, 16))])
    assert steps.references(steps.steps[1])[0].shape == (8, 8, 3)
    wide = steps_of(tmp_path / "wide", [record("r", 2, size=(8, 12))])
    with pytest.raises(ClvrError, match="record 0 has images of 12 x 8 pixels"):
        wide.sources(wide.steps[1], wide.steps[1].proxies)


def test_the_error_without_proxy_prompts_says_how_to_make_them(tmp_path):
    bare = record("r", 2).trajectory
    with pytest.raises(ClvrError, match=r"no step of 1 trajectories has proxy prompts.*`clvr synth`") as caught:
        steps_of(tmp_path / "d", [bare])
    assert "\n" not in str(caught.value)
