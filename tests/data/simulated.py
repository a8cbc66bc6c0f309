"""Simulated trajectories of the shapes world, in the form of datasets."""

import numpy as np

from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory
from clvr_jax.reasoning.conversation.actions import strip_action

TWO_IMAGES = (10, 23, 31, 52)
"""Seeds of trajectories with two images and texts of similar lengths, to compile few programs."""


def simulated(seed: int) -> Trajectory:
    """Returns a trajectory of the oracle with an image generator that sometimes makes mistakes."""
    source = simulate_trajectory(np.random.default_rng(seed))
    steps = [
        Step(strip_action(reply), IMAGE_GEN, tuple(range(number)), canvas)
        for number, (reply, canvas) in enumerate(zip(source.replies, source.canvases, strict=False))
    ]
    last = source.replies[-1]
    if not last.endswith(TERMINATE):
        return Trajectory(source.prompt, tuple(steps), "step limit")
    return Trajectory(source.prompt, (*steps, Step(strip_action(last), TERMINATE)), "accepted", seed=seed)
