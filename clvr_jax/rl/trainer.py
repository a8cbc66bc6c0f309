"""The RL trainer: runs the epochs of a `PPRLTask` in the training loop."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.buckets.objects import has_entry
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.files.buckets.run_files import active_run_files
from clvr_jax.rl.config import PPRLConfig
from clvr_jax.rl.epoch import PROXY_PROMPTS, EpochRunner
from clvr_jax.rl.state import PPRLState
from clvr_jax.rl.task import PPRLTask
from clvr_jax.sharding import process_allgather
from clvr_jax.training.loop import export_in_process_0, mesh_of, run_loop
from clvr_jax.training.prefetch import IteratorState, check_batch

_IDENTITY = "begun.json"


def fit(
    task: PPRLTask,
    config: PPRLConfig,
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    on_begin: Callable[[], None] | None = None,
    on_export: Callable[[Path, int], None] | None = None,
) -> PPRLState:
    """Trains; checkpoints, metrics, grids of samples and the exported model are stored in `out`.

    Args:
      task: what to train; made for `config`.
      config: of the run.
      out: directory of the run, which may be in a bucket: `checkpoints/`, `metrics.jsonl`, `samples/`, `export/`.
      resume: continue from the newest checkpoint in `out`; without it an `out` that holds one is an error.
      stop_after: stop (with a checkpoint) once this many epochs are done.
      on_begin: called once nothing refuses the run any more, before its first epoch.
      on_export: (directory, number of optimizer steps) -> None, called in process 0 with the exported model.
    Returns: the final state; the saved state of a run that was asked to stop (SIGTERM), which is that before the epoch
      that it was in.
    Raises: KeyboardInterrupt after Ctrl-C, once the state is saved; ClvrError, with the state saved, if images cannot
      be scored any more or too many steps in a row are not finite; UsageError for a mesh or numbers that do not fit
      together.
    """
    out = storage_path(out)

    def begin() -> None:
        if on_begin is not None:
            on_begin()
        if jax.process_index() == 0:
            write_json(out / _IDENTITY, config.identity)

    def make_runner(epochs: range, _: IteratorState) -> contextlib.AbstractContextManager[EpochRunner]:
        files = active_run_files()
        if jax.process_index() == 0:
            files.fetch(PROXY_PROMPTS)
        return contextlib.nullcontext(EpochRunner(task, config, layout, files.directory))

    def export(state: PPRLState, directory: Path) -> None:
        gathered = dataclasses.replace(task, base=process_allgather(task.base))
        export_in_process_0(gathered.export, state.ema, directory)

    with mesh_of(config.mesh) as layout:
        check_batch(np.zeros((config.microbatch_size, 1)), layout, 1)
        if resume:
            _check_identity(config, out)
        return run_loop(
            config.loop(task.name),
            lambda: PPRLState.abstract(task.params, config.optimizer.make(), layout),
            lambda: PPRLState.create(task.params, config.optimizer.make(), layout),
            make_runner,
            export,
            out,
            resume=resume,
            stop_after=stop_after,
            on_begin=begin,
            on_export=on_export,
        )


def _check_identity(config: PPRLConfig, out: Path) -> None:
    """Compares with the first run in `out` before arrays are read: another alpha has arrays of the same shapes."""
    if has_entry(out / _IDENTITY) and (found := read_json(out / _IDENTITY)) != config.identity:
        raise ClvrError(f"{out}: was begun with {found}, this run has {config.identity}; choose another --out")
