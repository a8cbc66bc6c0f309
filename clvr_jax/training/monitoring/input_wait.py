"""Waiting for a batch: what of it the devices wait too, and a line in the log if it does not come."""

import concurrent.futures
import time
from concurrent.futures import Future
from typing import Any

import jax
from jaxtyping import PyTree

from clvr_jax.display.console import console
from clvr_jax.training.monitoring.clock import phase

_SECONDS_BETWEEN_LOOKS = 0.005
_SECONDS_TO_NOTICE = 30.0


class InputWait:
    """Waits for the batches of a run.

    Args:
      name: of the task.
      seconds: a batch that takes longer is reported, and again whenever this time has doubled.
    """

    def __init__(self, name: str, seconds: float = _SECONDS_TO_NOTICE):
        self._name, self._seconds = name, seconds
        self.computed: PyTree = ()
        """Results of the last step, which may still be computed."""

    def __call__(self, batch: Future[Any], step: int) -> None:
        """Returns when a batch is there, or its making has failed.

        The time until the devices have computed what they were given counts as the phase that the caller is in; only
        then do they wait.
        """
        while not self._is_computed():
            if _is_done(batch, _SECONDS_BETWEEN_LOOKS):
                return
        with phase("input"):
            began, limit = time.monotonic(), self._seconds
            while not _is_done(batch, limit - (time.monotonic() - began)):
                waited = time.monotonic() - began
                if waited >= limit:
                    console.print(stalled(self._name, step, waited), markup=False)
                    limit *= 2

    def _is_computed(self) -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.computed))


def stalled(name: str, step: int, seconds: float) -> str:
    """Returns the line that reports a batch which does not come."""
    process = f"process {jax.process_index()} " if jax.process_count() > 1 else ""
    return (
        f"{name}: step {step + 1}: {process}has waited {seconds:.0f} s for its batch: the input has stalled, or is "
        "slower than the step"
    )


def _is_done(batch: Future[Any], seconds: float) -> bool:
    return bool(concurrent.futures.wait([batch], max(seconds, 0.0)).done)
