"""Tests of exact proxy prompts of trajectories with mistakes."""

import dataclasses

import numpy as np
import pytest

from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.data.shapes_proxies import main, with_exact_proxies
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.conversation.actions import strip_action
from clvr_jax.reasoning.trajectories.trajectory import GAVE_UP, Step, Trajectory
from clvr_jax.rewards import ProxyReward, RewardInput, ShapesJudge
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.language.grammar import DENSE_TIERS
from clvr_jax.worlds.shapes.prompts import train_prompt


def simulated(seed, error_rate=0.5):
    """Returns a trajectory of an image generator that makes mistakes, and the requested images."""
    rng = np.random.default_rng(seed)
    source = simulate_trajectory(rng, train_prompt(rng, {"complex": 1.0}, DENSE_TIERS), error_rate=error_rate)
    steps = tuple(
        Step(strip_action(reply), "<|image_gen|>", tuple(range(at)), canvas)
        for at, (reply, canvas) in enumerate(zip(source.replies, source.canvases, strict=False))
    )
    return TrajectoryRecord(str(seed), Trajectory(source.prompt, steps, GAVE_UP)), source.targets


def test_right_images_have_full_scores_and_wrong_ones_lower_scores():
    reward, wrong = ProxyReward(ShapesJudge(), ShapesJudge(), in_flight=1), 0
    for seed in range(8):
        record, targets = simulated(seed)
        steps = record.trajectory.steps
        for at, proxies in enumerate(with_exact_proxies(record).proxies):
            before = [steps[index].image for index in proxies.i_ref]
            assert proxies.i_ref == ((at - 1,) if at else ())
            cases = [RewardInput(image, proxies, before) for image in (targets[at], steps[at].image)]
            right, generated = reward.scores(cases).values
            if not detect(targets[at]).unclear:  # unclear cells that no edit names stay, and lower the score
                assert right == 1.0
                wrong += generated < 1.0
                assert (generated == 1.0) == np.array_equal(targets[at], steps[at].image)
    assert wrong > 10


def test_rolled_back_steps_have_no_proxies_and_are_not_edited():
    record, _ = simulated(3, error_rate=0.0)
    steps = list(record.trajectory.steps)
    steps[1] = dataclasses.replace(steps[1], rolled_back=True)
    steps[2] = dataclasses.replace(steps[2], references=(0,))
    trajectory = dataclasses.replace(record.trajectory, steps=tuple(steps))
    found = with_exact_proxies(dataclasses.replace(record, trajectory=trajectory)).proxies
    assert found[1] is None
    assert found[2].i_ref == (0,)


def test_saved_rollouts_become_a_dataset_of_steps(tmp_path, capsys):
    for seed in (0, 1):
        simulated(seed)[0].trajectory.save(tmp_path / "source" / str(seed))
    main(tmp_path / "source", tmp_path / "dataset")
    assert capsys.readouterr().out.endswith("2 trajectories\n")
    steps = ProxySteps(TrajectoryDataset(tmp_path / "dataset"), 64).steps
    assert len(steps) == sum(len(simulated(seed)[0].trajectory.steps) for seed in (0, 1))
    assert max(len(step.history) for step in steps) >= 4
    with pytest.raises(ClvrError, match="no saved trajectories"):
        main(tmp_path / "nothing", tmp_path / "other")
