"""Two ways to do the same thing, timed in turns in one process."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Seconds of each round; a ratio above 1 says that ours is faster."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """One for each round: what slows the machine for a while slows both."""
        return [slow / fast for fast, slow in zip(self.ours, self.theirs, strict=True)]


def contest(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Result:
    """Each runs once unmeasured (compilation, caches), then both take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for contestant, own in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            contestant()
            if number:
                own.append(time.perf_counter() - began)
    return Result(*times)


def show(name: str, result: Result, target: float) -> None:
    """One line: medians, the ratio with its range over the rounds, and the target."""
    ratios = sorted(result.ratios)
    ours, theirs = (1000 * statistics.median(times) for times in (result.ours, result.theirs))
    print(
        f"{name:<52} ours {ours:9.1f} ms   other {theirs:9.1f} ms   ratio {statistics.median(ratios):5.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}), target {target:.1f}",
        flush=True,
    )


def arguments(description: str | None, model: str = "shapes-tiny") -> argparse.Namespace:
    """Options that every benchmark has; `model` if none is given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=model, help="shipped name or folder")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def folder_of(model: str) -> Path:
    """Where a model lies."""
    from clvr_jax.pipelines.registry import resolve

    return resolve(model)[0]
