"""Which steps of a dataset are drawn for: the paper's mixture, and what is part of their history."""

from collections import Counter

import numpy as np
import pytest

from clvr_jax.data.proxy_steps import ProxySteps
from clvr_jax.data.trajectory_dataset import TrajectoryDataset, write_dataset
from clvr_jax.data.trajectory_record import ProxyPrompts, TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory


def picture(value, height=8, width=8):
    return np.full((height, width, 3), value, np.uint8)


def record(name, count, rolled_back=None, size=(8, 8)):
    """`count` drawings, each an edit of the one before it, with proxies, and a stop without."""
    steps, proxies = [], []
    for number in range(count):
        is_back = number == rolled_back
        steps.append(Step(f"reply {number}", IMAGE_GEN, (), picture(10 * number, *size), rolled_back=is_back))
        proxies.append(ProxyPrompts(f"whole {number}", *([f"edit {number}", (number - 1,)] if number else [])))
    trajectory = Trajectory(f"prompt {name}", (*steps, Step("done", TERMINATE)), "accepted")
    return TrajectoryRecord(name, trajectory, proxies=(*proxies, None))


def steps_of(folder, records, size=8):
    write_dataset(folder, records)
    return ProxySteps(TrajectoryDataset(folder), size)


def test_first_drawings_and_edits_are_half_and_half_and_the_edits_even(tmp_path):
    steps = steps_of(tmp_path / "d", [record(f"r{n}", 7) for n in range(6)])
    assert Counter(step.kind for step in steps.steps) == {0: 6, 1: 6, 2: 6, 3: 6, 4: 18}
    for epoch in range(3):
        chosen = steps.chosen(epoch, 8, seed=0)
        assert Counter(step.kind for step in chosen) == {0: 4, 1: 1, 2: 1, 3: 1, 4: 1}
        assert len({step.number for step in chosen}) == 8
    few = [step.kind for epoch in range(8) for step in steps.chosen(epoch, 3, seed=0)]
    assert Counter(few) == {0: 12, 1: 3, 2: 3, 3: 3, 4: 3}


def test_the_steps_of_an_epoch_follow_from_seed_and_epoch(tmp_path):
    steps = steps_of(tmp_path / "d", [record(f"r{n}", 3) for n in range(8)])
    assert steps.chosen(3, 6, seed=1) == steps.chosen(3, 6, seed=1)
    assert steps.chosen(3, 6, seed=1) != steps.chosen(4, 6, seed=1) != steps.chosen(4, 6, seed=2)


def test_edits_take_the_place_of_edits_that_are_missing(tmp_path):
    steps = steps_of(tmp_path / "d", [record(f"r{n}", 2) for n in range(8)])
    assert Counter(step.kind for step in steps.chosen(0, 8, seed=0)) == {0: 4, 1: 4}
    everything = steps.chosen(0, 16, seed=0)
    assert {step.number for step in everything} == set(range(16))
    with pytest.raises(UsageError, match="16 steps can be drawn for, 17 are asked for"):
        steps.chosen(0, 17, seed=0)


def test_what_was_rolled_back_is_neither_drawn_for_nor_history(tmp_path):
    steps = steps_of(tmp_path / "d", [record("r", 4, rolled_back=1)])
    assert [step.history for step in steps.steps] == [(), (0,), (0, 2)]
    last = steps.steps[-1]
    assert last.text == "prompt r\nreply 0<IMG_GEN_1>\nreply 2<IMG_GEN_2>\nreply 3"
    assert last.last_text == "reply 3"
    assert [shown[0, 0, 0] for shown in steps.references(last)] == [0, 20]
    assert [shown[0, 0, 0] for shown in steps.edited(last, last.proxies)] == [20]


def test_steps_with_equal_texts_are_different_groups(tmp_path):
    steps = steps_of(tmp_path / "d", [record("same", 1), record("same", 1)])
    assert steps.steps[0].text == steps.steps[1].text
    assert steps.steps[0].number != steps.steps[1].number


def test_pictures_are_scaled_to_what_is_drawn(tmp_path):
    steps = steps_of(tmp_path / "d", [record("r", 2, size=(16, 16))])
    assert steps.references(steps.steps[1])[0].shape == (8, 8, 3)
    wide = steps_of(tmp_path / "wide", [record("r", 2, size=(8, 12))])
    with pytest.raises(ClvrError, match="record 0 has pictures of 12 x 8 pixels"):
        wide.edited(wide.steps[1], wide.steps[1].proxies)


def test_a_dataset_without_proxy_prompts_says_how_to_make_them(tmp_path):
    bare = record("r", 2).trajectory
    with pytest.raises(ClvrError, match=r"no step of 1 trajectories has proxy prompts.*`clvr synth`") as caught:
        steps_of(tmp_path / "d", [bare])
    assert "\n" not in str(caught.value)
