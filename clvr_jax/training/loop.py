"""The training loop of every run: resume, iterate, log, save, stop and export.

An iteration is one optimizer step of SFT and distillation, or one epoch of RL:

    state = checkpoint or initial state
    for iteration in range(state.iteration, config.iterations):
        stop here, with a checkpoint, if SIGTERM or Ctrl-C asked for it
        state, metrics = runner.run(state, iteration)
        every log_every iterations: log the metrics, end the run if too many steps were not finite, save if it is due
    export the EMA of the parameters

The state is a pytree. The data of an iteration depends on the seed and its number alone, or the state of the data
iterator is saved with the state: a run that is killed and resumed gives the same bits as one that was not.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Protocol

import jax
from jaxtyping import PyTree

from clvr_jax.display.console import Advance, console, progress
from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets.paths import is_bucket, storage_path
from clvr_jax.files.buckets.run_files import RunFiles, run_files, staged
from clvr_jax.files.json_input import JSON
from clvr_jax.files.locks import check_lock
from clvr_jax.processes import broadcast_decision, broadcast_from_host0
from clvr_jax.programs.settings import programs_in
from clvr_jax.sharding import MeshConfig, MeshLayout, active_layout, process_allgather, without_layout
from clvr_jax.training.checkpoint import CheckpointConfig, Checkpoints
from clvr_jax.training.graceful_shutdown import GracefulShutdown, graceful_shutdown
from clvr_jax.training.metrics import METRICS, MetricLog
from clvr_jax.training.monitoring.clock import Goodput, active_goodput, phase
from clvr_jax.training.monitoring.hosts import Hosts, Reports
from clvr_jax.training.monitoring.ledger import FILE as GOODPUT
from clvr_jax.training.monitoring.nonfinite import nonfinite_report
from clvr_jax.training.optimization.step import State
from clvr_jax.training.prefetch import IteratorState
from clvr_jax.trees import Params

StepMetrics = Mapping[str, jax.Array | float]
"""The metrics of an iteration, scalars by name; arrays may still be computed."""


class StopRequestedError(Exception):
    """The run was asked to stop in the middle of an iteration, which has not changed the state."""


class IterationError(ClvrError):
    """An iteration cannot be completed, for a reason outside of the run; it has not changed the state."""

    problem: ClassVar[str] = "cannot be completed"
    """Predicate of the error message, whose subject is the iteration."""


class Runner(Protocol[State]):
    """Runs the iterations of a run, one after the other."""

    def run(self, state: State, iteration: int, shutdown: GracefulShutdown) -> tuple[State, StepMetrics]:
        """Runs one iteration.

        Args:
          state: before it; its arrays may be donated.
          iteration: number of finished iterations.
          shutdown: may be asked in the middle of an iteration that takes long.
        Returns: the state after it, and its metrics, which may still be computed.
        Raises: StopRequestedError; IterationError.
        """
        ...

    def summarize(self, metrics: Sequence[StepMetrics]) -> dict[str, float]:
        """Returns what is logged of the iterations since the last call."""
        ...

    def iterator_state(self) -> IteratorState:
        """Returns the state of the data iterator after the last iteration, as JSON values."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """Configuration of the loop, as the configurations of SFT and RL make it.

    name: of the task. unit: of iterations, "step" or "epoch". iterations: number of them in the run. log_every: number
    of iterations between logs. max_nonfinite_steps: the run ends after so many optimizer steps in a row whose loss or
    gradients are not finite. note: logged metrics -> text of the progress line. wandb: project of Weights & Biases, ""
    for none. goodput_logger: logger of Google Cloud that the goodput is reported to as well, "" for none.
    logged_config: the configuration that Weights & Biases logs. profile: iterations that are profiled.
    """

    name: str
    unit: str
    iterations: int
    max_nonfinite_steps: int
    checkpoint: CheckpointConfig
    note: Callable[[Mapping[str, float]], str]
    log_every: int = 1
    wandb: str = ""
    goodput_logger: str = ""
    logged_config: Mapping[str, JSON] = field(default_factory=dict)
    profile: range = range(0)


def run_loop(
    config: LoopConfig,
    abstract: Callable[[], State],
    create: Callable[[], State],
    make_runner: Callable[[range, IteratorState], contextlib.AbstractContextManager[Runner[State]]],
    export: Callable[[State, Path], None],
    out: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    on_begin: Callable[[], None] | None = None,
    on_export: Callable[[Path, int], None] | None = None,
) -> State:
    """Trains; checkpoints, metrics, profiles and the exported model are stored in `out`.

    Args:
      config: of the loop.
      abstract: () -> shapes, dtypes and shardings of the state, with which a checkpoint is restored.
      create: () -> state of iteration 0 on the devices; called if there is no checkpoint.
      make_runner: (iterations that will be run, state of the data iterator or {}) -> context of the runner.
      export: (final state, directory) -> None.
      out: directory of the run, which may be in a bucket: `checkpoints/`, `metrics.jsonl`, TensorBoard events,
        `profile/`, `export/`.
      resume: continue from the newest checkpoint in `out`; without it an `out` that holds one is an error.
      stop_after: stop (with a checkpoint) once so many iterations are done.
      on_begin: called when nothing refuses the run any more, before its first iteration.
      on_export: (directory, number of optimizer steps) -> None, called in process 0 after the export, whose directory
        is a temporary one if `out` is in a bucket.
    Returns: the final state; the saved state of a run that was asked to stop (SIGTERM).
    Raises: KeyboardInterrupt after Ctrl-C, once the state is saved; ClvrError if an iteration cannot be completed or
      too many optimizer steps in a row are not finite.
    """
    out = storage_path(out)
    with contextlib.ExitStack() as stack:
        # Before the clock, whose last line is copied as well.
        files = stack.enter_context(run_files(out, lambda: check_lock(out)))
        goodput = active_goodput()
        if goodput is None or goodput.is_recording:
            goodput = stack.enter_context(Goodput())
        if config.goodput_logger:
            broadcast_from_host0(lambda: _log_to_cloud(goodput, out.name, config.goodput_logger))
        if not is_bucket(out):
            stack.enter_context(programs_in(out / "programs"))
        shapes = abstract()
        with goodput.phase("restore"):
            checkpoints = stack.enter_context(Checkpoints(out / "checkpoints", config.checkpoint.max_to_keep))
            restored = checkpoints.restore(shapes, resume=resume)
        state, iterator_state = restored if restored is not None else (create(), {})
        if on_begin is not None:
            on_begin()
        start, end = int(state.iteration), min(config.iterations, stop_after or config.iterations)
        if start < end:
            if jax.process_index() == 0 and resume:
                files.fetch(GOODPUT)
            earlier = goodput.open(files.directory, start, resume=resume)
            if earlier.starts > 1 and jax.process_index() == 0:
                console.print(f"{config.name}: until now {earlier.summary()}", markup=False)
            with (
                _metric_log(files, start, config) as log,
                progress(config.name, config.iterations, start) as advance,
                graceful_shutdown() as shutdown,
                _profiler(files.directory / "profile", config.profile) as profile,
                make_runner(range(start, end), iterator_state) as runner,
            ):
                saver = _Saver(config.checkpoint, checkpoints, start, lambda: _copy(files))
                loop = _Loop(config, runner, saver, log, advance, profile, out, goodput)
                state = loop.run(state, range(start, end), shutdown)
                goodput.turn("log")  # closing the files of metrics and profiles
        with phase("save"):
            checkpoints.wait()
        iteration = int(state.iteration)
        if iteration == config.iterations:
            with phase("export"):
                _export(export, state, out, on_export)
        elif goodput.end != "preempted":
            goodput.end = "paused"
        if start < end and jax.process_index() == 0:
            console.print(f"{config.name}: {goodput.record(iteration).summary()}", markup=False)
    return state


def _export(
    export: Callable[[State, Path], None], state: State, out: Path, on_export: Callable[[Path, int], None] | None
) -> None:
    """Exports a state; only process 0 has a directory and calls `on_export`."""
    if jax.process_index() != 0:
        export(state, out / "export")
        return
    with staged(out / "export") as directory:
        export(state, directory)
        if on_export is not None and directory.is_dir():
            on_export(directory, int(state.step))
        check_lock(out)


def _metric_log(files: RunFiles, start: int, config: LoopConfig) -> MetricLog:
    if jax.process_index() == 0:
        files.fetch(METRICS)
    return MetricLog(files.directory, start, config.wandb, config.name, config.logged_config)


def _copy(files: RunFiles) -> None:
    """Copies what process 0 has logged to a run's directory in a bucket, before a checkpoint of the same step.

    Raises: ClvrError, on every process, if the bucket cannot be written, or another run writes there.
    """
    if files.is_copied:
        broadcast_from_host0(files.copy)


def _log_to_cloud(goodput: Goodput, job: str, logger: str) -> None:
    from clvr_jax.training.monitoring.cloud_recorder import CloudReport, cloud_recorder

    goodput.listeners.append(CloudReport(cloud_recorder(job, logger), goodput))


@dataclass
class _Loop(Generic[State]):
    """The loop, with everything that it reports to."""

    config: LoopConfig
    runner: Runner[State]
    saver: "_Saver"
    log: MetricLog
    advance: Advance
    profile: Callable[[int], None]
    out: Path
    goodput: Goodput

    def __post_init__(self) -> None:
        self._hosts, self._reports, self._skipped = Hosts(self.goodput), Reports(), 0

    def run(self, state: State, iterations: range, shutdown: GracefulShutdown) -> State:
        """Runs iterations, or fewer if the run is asked to stop."""
        config, pending = self.config, list[StepMetrics]()
        self._skipped = int(state.skipped)
        self.goodput.turn("other")
        for iteration in iterations:
            try:
                if shutdown.should_stop():
                    raise StopRequestedError
                with phase("log"):
                    self.profile(iteration)
                # Here the time of a step is taken: until the work is handed to the devices, or, where the runner waits
                # for results, until they are there. `_log` takes the rest: it waits for the devices.
                with phase("step"):
                    self.goodput.begin_step(iteration)
                    state, metrics = self.runner.run(state, iteration, shutdown)
            except StopRequestedError:
                self._log(state, iteration, pending)
                self.goodput.record(iteration)
                with phase("save"):
                    self.saver.save(state, self.runner.iterator_state())
                    self.saver.checkpoints.wait()
                self.goodput.end = "preempted"
                shutdown.report(config.name, f"{config.unit} {iteration}")
                break
            except IterationError as error:
                with phase("save"):
                    self.saver.save(state, self.runner.iterator_state())
                raise ClvrError(
                    f"{config.name}: {config.unit} {iteration + 1} {error.problem} ({error}); {config.unit} "
                    f"{iteration} is saved, --resume continues from it"
                ) from error
            pending.append(metrics)
            is_last = iteration + 1 == iterations.stop
            if (iteration + 1) % config.log_every == 0 or is_last:
                self._log(state, iteration + 1, pending)
                pending = []
                with phase("log"):
                    is_saving = is_last or self.saver.is_due()
                    if is_saving or self.goodput.is_due():
                        # Before the checkpoint, so that a line never has steps on both sides of it.
                        self.log.write_events(iteration + 1, self.goodput.record(iteration + 1).scalars())
                if is_saving:
                    with phase("save"):
                        self.saver.save(state, self.runner.iterator_state())
        return state

    def _log(self, state: State, iteration: int, pending: Sequence[StepMetrics]) -> None:
        """Logs the metrics of the last iterations, and ends a run that no longer learns."""
        if not pending:
            return
        with phase("step"):  # reading metrics waits until the devices have computed them
            metrics = self.runner.summarize(pending)
            skipped, in_a_row = int(state.skipped), int(state.skipped_in_a_row)
        with phase("log"):
            self._report(iteration, pending, skipped)
            self.log.write(iteration, metrics)
            self.advance(iteration, self.config.note(metrics))
        if in_a_row >= self.config.max_nonfinite_steps:
            raise ClvrError(
                f"{self.config.name}: loss or gradients of {in_a_row} steps in a row are not finite, up to "
                f"{self.config.unit} {iteration}; resume the last checkpoint in {self.out / 'checkpoints'} with a "
                "smaller learning rate"
            )

    def _report(self, iteration: int, pending: Sequence[StepMetrics], skipped: int) -> None:
        """Prints a line in process 0 about steps that are not finite, and one about a slow process."""
        config, delay = self.config, self._hosts.compare()
        if jax.process_index() == 0:
            line = nonfinite_report(config.name, config.unit, iteration, pending, self._skipped, skipped)
            if line is not None:
                console.print(line, markup=False)
            if delay is not None and delay.is_notable and self._reports.is_new(str(delay.process)):
                console.print(delay.report(config.name, f"{config.unit} {iteration}"), markup=False)
        self._skipped = skipped


class _Saver:
    """Saves checkpoints: at most one of each iteration, and not before the interval has passed unless asked to.

    start: iteration that the run begins or resumes at. before: called before each save.
    """

    def __init__(self, config: CheckpointConfig, checkpoints: Checkpoints, start: int, before: Callable[[], None]):
        self.checkpoints, self._seconds, self._before = checkpoints, 60 * config.save_interval_minutes, before
        # The state that a run begins with has not been saved yet.
        self._saved, self._saved_at = start if start else -1, time.monotonic()

    def is_due(self) -> bool:
        """Returns whether the interval has passed, as process 0 decides."""
        return broadcast_decision(time.monotonic() - self._saved_at > self._seconds)

    def save(self, state: State, iterator_state: IteratorState) -> None:
        """Saves a state unless it was saved before."""
        if (iteration := int(state.iteration)) != self._saved:
            self._before()
            self.checkpoints.save(iteration, state, iterator_state)
            self._saved, self._saved_at = iteration, time.monotonic()


@contextlib.contextmanager
def _profiler(directory: Path, profiled: range) -> Iterator[Callable[[int], None]]:
    """Yields a function that is called before each iteration, and traces those in `profiled` as far as they are run."""
    is_tracing = False

    def before(iteration: int) -> None:
        nonlocal is_tracing
        if is_tracing and iteration not in profiled:
            jax.profiler.stop_trace()
            is_tracing = False
        elif profiled and iteration == profiled[0]:
            jax.profiler.start_trace(str(directory))
            is_tracing = True

    try:
        yield before
    finally:
        if is_tracing:
            jax.profiler.stop_trace()


@contextlib.contextmanager
def mesh_of(mesh: MeshConfig) -> Iterator[MeshLayout]:
    """Activates the layout of a run; a layout that is active already is taken as it is."""
    layout = active_layout()
    if layout is not None:
        yield layout
        return
    with MeshLayout(mesh.make()).active() as layout:
        yield layout


def export_in_process_0(export: Callable[[Params, Path], None], params: Params, directory: Path) -> None:
    """Exports parameters in process 0, which first gets the shards of all hosts."""
    params = process_allgather(params)
    if jax.process_index() == 0:
        with without_layout():
            export(params, directory)


def wait_on_cpu(layout: MeshLayout, result: PyTree) -> None:
    """Waits for a result if the devices are CPUs.

    Virtual devices share few threads: programs in flight could wait for one another for ever.
    """
    if layout.platform == "cpu":
        jax.block_until_ready(result)
