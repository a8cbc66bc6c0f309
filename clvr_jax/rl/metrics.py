"""What an epoch of PPRL says of itself: rewards by step, guard rails, where the time went, and a grid of samples."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from clvr_jax.data.proxy_steps import LATE
from clvr_jax.files import write_atomically
from clvr_jax.reasoning.images import encode_png
from clvr_jax.rewards.reward import Scores
from clvr_jax.rl.algorithms.diffusion_nft import Advantages


def of_rewards(scores: Scores, advantages: Advantages, kinds_n: np.ndarray, groups_n: np.ndarray) -> dict[str, float]:
    """Means of the rewards, and what of them is of no use.

    Args:
      scores: of the n samples.
      advantages: that follow from them.
      kinds_n: of each sample's step: 0 for a first drawing, else an edit, see `ProxyStep.kind`.
      groups_n: key of each sample's group.
    Returns: "reward", by kind "reward_t2i" and "reward_i2i", by step "reward_step_0" ... "reward_step_4_on";
      "reward_std", the mean deviation within a group; each part of the reward; "zero_variance_groups";
      "dropped_samples"; "dropped_groups" (of which no sample counts). What has no sample is left out.
    """
    values, counts = scores.values, advantages.counts
    masks = {"reward": counts, "reward_t2i": counts & (kinds_n == 0), "reward_i2i": counts & (kinds_n > 0)}
    for kind in range(LATE + 1):
        masks[f"reward_step_{kind}{'_on' if kind == LATE else ''}"] = counts & (kinds_n == kind)
    found = {name: float(values[mask].mean()) for name, mask in masks.items() if mask.any()}
    for name, part in scores.parts.items():
        if (known := np.isfinite(part)).any():
            found[f"parts/{name}"] = float(part[known].mean())
    alive = np.array([counts[groups_n == key].any() for key in np.unique(groups_n)])
    return {
        **found,
        "reward_std": float(advantages.std[alive].mean()),
        "zero_variance_groups": float(advantages.zero_variance),
        "dropped_samples": float((~counts).sum()),
        "dropped_groups": float((~alive).sum()),
    }


def means_over_updates(found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The mean of each metric over the optimizer steps of an epoch."""
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in (found[0] if found else ())}


class Stopwatch:
    """Where the seconds of an epoch go: what is measured by name, and what is outside of all of it."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the time of a block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def read(self) -> dict[str, float]:
        """seconds, seconds_NAME of each name, and seconds_outside."""
        total = time.monotonic() - self._began
        named = {f"seconds_{name}": seconds for name, seconds in self._seconds.items()}
        return {"seconds": total, **named, "seconds_outside": total - sum(named.values())}


def write_grid(path: Path, pictures: Sequence[np.ndarray], group: int, rows: int = 8) -> None:
    """A PNG with a row for each group, at most `rows`.

    pictures: (groups * group, h, w, 3) uint8 of each call, all of one size.
    """
    shown = np.concatenate(pictures)[: rows * group]
    _, height, width, _ = shown.shape
    grid = shown.reshape(-1, group, height, width, 3).swapaxes(1, 2)
    write_atomically(path, encode_png(grid.reshape(-1, group * width, 3)))
