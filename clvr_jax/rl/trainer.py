"""The RL trainer: epochs, checkpoints, metrics, graceful shutdown and export."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from clvr_jax.console import progress
from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json, write_json
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.epoch import EpochRunner, StopRequestedError
from clvr_jax.rl.scoring import ScoringError
from clvr_jax.rl.state import PPRLState
from clvr_jax.rl.task import PPRLTask
from clvr_jax.sharding import MeshLayout, active_layout, process_allgather, without_layout
from clvr_jax.training.checkpoint import Checkpoints
from clvr_jax.training.feed import check_batch
from clvr_jax.training.metrics import MetricLog
from clvr_jax.training.preemption import agreed, preemption

_IDENTITY = "begun.json"


def fit(
    task: PPRLTask,
    config: PPRLConfig,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    on_begin: Callable[[], None] | None = None,
) -> PPRLState:
    """Trains; checkpoints, metrics, grids of samples and the exported model are stored in `out`.

    Args:
      task: what to train; made for `config`.
      config: of the run.
      out: directory of the run: `checkpoints/`, `metrics.jsonl`, `samples/`, `export/`.
      resume: continue from the newest checkpoint in `out`; without it an `out` that holds one is an error.
      stop_after: stop (with a checkpoint) once this many epochs are done.
      on_begin: called once nothing refuses the run any more, before its first epoch.
    Returns: the final state; of a run that was asked to stop (SIGTERM), the state that was saved.
    Raises: ClvrError, with the state saved, if images cannot be scored any more or too many steps in a row are not
      finite; UsageError for a mesh or numbers that do not fit together.
    """
    layout = active_layout() or MeshLayout(config.mesh.make())
    check_batch(np.zeros((config.microbatch_size, 1)), layout, 1)
    with layout.active(), Checkpoints(out / "checkpoints", config.checkpoint.max_to_keep) as checkpoints:
        state = PPRLState.create(task.params, config.optimizer.make(), layout)
        if resume:
            _check_identity(config, out)
        state, _ = checkpoints.restore_or(state, resume=resume)
        if on_begin is not None:
            on_begin()
        if jax.process_index() == 0:
            write_json(out / _IDENTITY, config.identity)
        last = min(config.epochs, stop_after or config.epochs)
        if int(state.epoch) < last:
            runner = EpochRunner(task, config, layout, out)
            state = _train(runner, _Saver(checkpoints, config, int(state.epoch)), state, last)
        if int(state.epoch) == config.epochs:
            _export(task, state, out / "export")
    return state


class _Saver:
    """Saves checkpoints between epochs: at most one of each epoch, and not before its interval has passed.

    start: epoch that the run begins or resumes at.
    """

    def __init__(self, checkpoints: Checkpoints, config: PPRLConfig, start: int):
        self.checkpoints, self._seconds = checkpoints, 60 * config.checkpoint.save_interval_minutes
        # The state that a run begins with has not been saved yet.
        self._epoch, self._saved_at = start if start else -1, time.monotonic()

    def is_due(self) -> bool:
        """Whether the interval has passed, decided by process 0."""
        return agreed(time.monotonic() - self._saved_at > self._seconds)

    def save(self, state: PPRLState) -> None:
        """Saves a state unless it was saved before."""
        if int(state.epoch) != self._epoch:
            self.checkpoints.save(int(state.epoch), state, {})
            self._epoch, self._saved_at = int(state.epoch), time.monotonic()


def _train(runner: EpochRunner, saver: _Saver, state: PPRLState, last: int) -> PPRLState:
    """Trains up to epoch `last`, or until the run is asked to stop."""
    task, config, start = runner.task, runner.config, int(state.epoch)
    with (
        MetricLog(runner.out, start, config.wandb, task.name, dataclasses.asdict(config)) as log,
        progress(task.name, config.epochs, start) as advance,
        preemption() as asked,
    ):
        for epoch in range(start, last):
            try:
                state, metrics = runner.run(state, epoch, asked)
            except StopRequestedError:
                saver.save(state)
                saver.checkpoints.wait()
                asked.report(task.name, f"epoch {epoch}")
                break
            except ScoringError as error:
                saver.save(state)
                raise ClvrError(
                    f"{task.name}: epoch {epoch + 1} cannot be scored ({error}); epoch {epoch} is saved, --resume "
                    "continues from it"
                ) from error
            log.write(epoch + 1, metrics)
            advance(epoch + 1, f"reward {metrics['reward']:.3f}  {metrics['seconds']:.1f} s/epoch")
            _check_finite(runner, state)
            if epoch + 1 == last or saver.is_due():
                saver.save(state)
    return state


def _check_finite(runner: EpochRunner, state: PPRLState) -> None:
    if (skipped := int(state.skipped_in_a_row)) >= runner.config.max_nonfinite_steps:
        raise ClvrError(
            f"{runner.task.name}: loss or gradients of {skipped} updates in a row are not finite, up to epoch "
            f"{int(state.epoch)}; resume the last checkpoint in {runner.out / 'checkpoints'} with a smaller learning "
            "rate"
        )


def _check_identity(config: PPRLConfig, out: Path) -> None:
    """Compares with the first run in `out` before arrays are read: another alpha has arrays of the same shapes."""
    if (out / _IDENTITY).exists() and (found := read_json(out / _IDENTITY)) != config.identity:
        raise ClvrError(f"{out}: was begun with {found}, this run has {config.identity}; choose another --out")


def _export(task: PPRLTask, state: PPRLState, directory: Path) -> None:
    """Exports in process 0, which first gets the weights of all hosts."""
    gathered = dataclasses.replace(task, base=process_allgather(task.base))
    ema = process_allgather(state.ema)
    if jax.process_index() == 0:
        with without_layout():
            gathered.export(ema, directory)
