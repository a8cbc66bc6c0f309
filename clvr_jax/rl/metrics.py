"""Metrics of an epoch of RL: rewards by kind of step, seconds by phase, and a grid of samples."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int

from clvr_jax.data.trajectories.proxy_steps import LATE
from clvr_jax.files.atomic_io import write_atomically
from clvr_jax.files.image_io import encode_png
from clvr_jax.rewards.reward import Scores
from clvr_jax.rl.advantages import Advantages
from clvr_jax.training.monitoring.clock import phase as goodput_phase


def reward_metrics(
    scores: Scores, advantages: Advantages, kinds_n: Int[np.ndarray, " n"], groups_n: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """Computes the means of the rewards, and the numbers of samples and groups from which nothing is learned.

    Args:
      scores: of the n samples.
      advantages: of the same samples.
      kinds_n: of each sample's step: 0 for a first image, else an edit, see `ProxyStep.kind`.
      groups_n: key of each sample's group.
    Returns: "reward", by kind "reward_t2i" and "reward_i2i", by step "reward_step_0" ... "reward_step_4_on";
      "reward_std", the mean standard deviation within a group; each part of the reward; "zero_variance_groups";
      "dropped_samples"; "dropped_groups" (without any valid sample). A mean over no samples is left out.
    """
    values, valid = scores.values, advantages.valid_mask
    masks = {"reward": valid, "reward_t2i": valid & (kinds_n == 0), "reward_i2i": valid & (kinds_n > 0)}
    for kind in range(LATE + 1):
        masks[f"reward_step_{kind}{'_on' if kind == LATE else ''}"] = valid & (kinds_n == kind)
    means = {name: float(values[mask].mean()) for name, mask in masks.items() if mask.any()}
    for name, part in scores.parts.items():
        if (known := np.isfinite(part)).any():
            means[f"parts/{name}"] = float(part[known].mean())
    is_alive = np.array([valid[groups_n == key].any() for key in np.unique(groups_n)])
    return {
        **means,
        "reward_std": float(advantages.std[is_alive].mean()),
        "zero_variance_groups": float(advantages.zero_variance),
        "dropped_samples": float((~valid).sum()),
        "dropped_groups": float((~is_alive).sum()),
    }


def mean_over_updates(metrics: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns the mean of each metric over the optimizer steps of an epoch; empty if there were none."""
    return {name: float(np.mean([each[name] for each in metrics])) for name in (metrics[0] if metrics else ())}


class Stopwatch:
    """Seconds of an epoch in each named phase, and outside of all phases."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the time of a block to a phase, which is one of a step in the account of the run's wall time."""
        start = time.monotonic()
        try:
            with goodput_phase(f"step/{phase}"):
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - start

    def read(self) -> dict[str, float]:
        """Returns seconds, seconds_NAME of each phase, and seconds_outside."""
        total = time.monotonic() - self._start
        phases = {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        return {"seconds": total, **phases, "seconds_outside": total - sum(phases.values())}


def write_grid(path: Path, images: Sequence[np.ndarray], group_size: int, rows: int = 8) -> None:
    """Writes a PNG with one group in each row.

    Args:
      path: of the file.
      images: (groups * group_size, h, w, 3) uint8 of each microbatch, all of one size.
      group_size: number of images in each row.
      rows: at most so many groups.
    """
    shown = np.concatenate(images)[: rows * group_size]
    _, height, width, _ = shown.shape
    grid = shown.reshape(-1, group_size, height, width, 3).swapaxes(1, 2)
    write_atomically(path, encode_png(grid.reshape(-1, group_size * width, 3)))
