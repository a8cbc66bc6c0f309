"""Trajectories of the shapes world as datasets hold them."""

import numpy as np

from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory
from clvr_jax.reasoning.actions import strip_action

TWO_PICTURES = (10, 23, 31, 52)
"""Seeds of trajectories with two pictures and texts of like lengths: few programs to compile."""


def simulated(seed: int) -> Trajectory:
    """A trajectory of the oracle with a drawer that sometimes errs."""
    told = simulate_trajectory(np.random.default_rng(seed))
    drawn = [
        Step(strip_action(reply), IMAGE_GEN, tuple(range(number)), canvas)
        for number, (reply, canvas) in enumerate(zip(told.replies, told.canvases, strict=False))
    ]
    last = told.replies[-1]
    if not last.endswith(TERMINATE):
        return Trajectory(told.prompt, tuple(drawn), "step limit")
    return Trajectory(told.prompt, (*drawn, Step(strip_action(last), TERMINATE)), "accepted", seed=seed)
