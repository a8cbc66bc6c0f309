"""The Apache Beam pipeline of the data engine, which runs on this machine, Dataflow, Flink or Spark.

    prompts.jsonl -> distributed to the workers -> synthesize each -> one outcome file for each

Every worker keeps many prompts in flight, since a prompt mostly waits for models. A prompt that has an outcome is
skipped, so an interrupted pipeline, or a bundle that Beam runs twice, repeats no work.
"""

import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared

from clvr_jax.data.engine.engine import UNREADABLE, synthesize
from clvr_jax.data.engine.health import Health, Held
from clvr_jax.data.engine.intake import item_from_json
from clvr_jax.data.engine.metering import StoppedError, UsageTracker
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import SynthConfig, WorkerContext
from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ProviderError


def run_pipeline(prompts: str, outcomes: str, make_context: Callable[[], WorkerContext], config: SynthConfig) -> None:
    """Synthesizes every prompt that has no outcome yet; returns when each was attempted once.

    A prompt for which a provider failed gets no outcome but a record of the failure; the next run retries it.

    Args:
      prompts: JSON lines as `intake.item_to_json` writes them, where all workers can read them.
      outcomes: directory or bucket that all workers can write.
      make_context: called once in each worker process; must be picklable for workers on other machines.
      config: budgets, prompts in flight, and the options of Beam.
    Raises: ClvrError if too many consecutive prompts fail; any other exception of a worker in the form in which Beam
      passes it on.
    """
    try:
        with beam.Pipeline(options=PipelineOptions(shlex.split(config.beam))) as pipeline:
            (
                pipeline
                | "read prompts" >> beam.io.ReadFromText(prompts)
                | "reshuffle" >> beam.Reshuffle()
                | "synthesize" >> beam.ParDo(_Synthesize(make_context, outcomes, config))
            )
    except ClvrError as error:
        raise ClvrError(str(error).partition(" [while running")[0]) from error


class _Process:
    """The state that all copies of the function in one worker process share: the models and their health."""

    def __init__(self, make_context: Callable[[], WorkerContext], max_failures: int):
        self.worker_context, self.health = make_context(), Health(max_failures)


class _Synthesize(beam.DoFn):
    """A function from lines of prompts to nothing; it writes the outcomes to the store."""

    def __init__(self, make_context: Callable[[], WorkerContext], outcomes: str, config: SynthConfig):
        self._make_workshop, self._outcomes, self._config = make_context, outcomes, config
        # Models are loaded once per process, although Beam makes several copies of this object in it.
        self._shared = Shared()

    def setup(self) -> None:
        """Loads the models."""
        self._process = self._shared.acquire(lambda: _Process(self._make_workshop, self._config.max_failures))
        self._health = self._process.health
        self._store = OutcomeStore(self._outcomes)
        self._pool = ThreadPoolExecutor(self._config.in_flight, thread_name_prefix="synth")
        self._running: set[Future[None]] = set()

    def process(self, line: str) -> Iterator[None]:
        """Starts a prompt as soon as fewer than `in_flight` are running. Raises: ClvrError if the run stops."""
        item = item_from_json(line)
        if item.id not in self._store:
            self._collect(at_most=self._config.in_flight - 1)
            self._running.add(self._pool.submit(self._finish, item))
        return iter(())

    def finish_bundle(self) -> None:
        """Waits for all prompts of the bundle. Raises: ClvrError if the run stops."""
        self._collect(at_most=0)
        held, is_written = self._health.take_held()
        for each in held:
            if is_written:
                self._write(each)
            else:
                detail = f"{each.outcome.reason}: {each.outcome.detail}"
                self._store.write_failed(each.outcome.item.id, "malformed", detail, each.usage)

    def teardown(self) -> None:
        """Waits for the prompts that are running."""
        self._pool.shutdown()

    def _collect(self, at_most: int) -> None:
        """Waits until at most `at_most` prompts are running.

        Raises: ClvrError if the run stops, after the last running prompt has ended.
        """
        while len(self._running) > at_most:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            error = next((error for future in done if (error := future.exception()) is not None), None)
            if error is None and (verdict := self._health.verdict) is not None:
                error = ClvrError(verdict)
            if error is not None:
                # The outcomes of the other prompts could not be written, or would fail as well.
                self._health.stop.set()
                for future in self._running:
                    future.cancel()
                wait(self._running)
                self._running = set()
                raise error

    def _finish(self, item: PromptItem) -> None:
        tracker, began = UsageTracker(stop=self._health.stop), time.monotonic()
        try:
            tracker.begin()
            roles = self._process.worker_context.roles(item, tracker)
            tool = tracker.image_model(self._process.worker_context.image_model)
            outcome = synthesize(item, roles, tool, self._config.settings, self._config.seed)
        except StoppedError:
            return
        except ProviderError as error:
            self._store.write_failed(item.id, error.fault, str(error), tracker.to_json())
            self._health.failed(str(error))
            return
        held = Held(outcome, tracker.to_json(), time.monotonic() - began, tracker.adapted)
        if outcome.reason in UNREADABLE:
            self._health.hold(held)
            return
        for each in [held, *self._health.worked()]:
            self._write(each)

    def _write(self, held: Held) -> None:
        self._store.write(held.outcome, held.usage, held.seconds, held.adapted)
