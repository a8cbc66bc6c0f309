"""The engine at scale: one function of a prompt, run by Apache Beam on this machine, Dataflow, Flink or Spark.

    prompts.jsonl -> spread over workers -> synthesize each -> one outcome file for each

Every worker keeps many prompts in flight, since most of the time of a prompt is spent waiting for models. A prompt
whose outcome is there is not worked on again, so a pipeline that died, or a bundle that Beam does twice, costs nothing.
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
from clvr_jax.data.engine.roles import PromptItem
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ProviderError


def run_pipeline(prompts: str, outcomes: str, make_workshop: Callable[[], WorkerContext], config: SynthConfig) -> None:
    """Works on every prompt that has no outcome yet; returns when all were tried.

    A prompt that a provider fails has none then, but a note of why; the next run works on it again.

    Args:
      prompts: JSON lines as `intake.item_to_json` writes them, where all workers can read them.
      outcomes: folder or bucket that all workers can write.
      make_workshop: called once in each worker process; must be picklable for workers elsewhere.
      config: budgets, prompts in flight, and the options of Beam.
    Raises: ClvrError if too many prompts in a row fail; whatever a worker raised that is no outcome of a prompt, as far
      as Beam lets it through.
    """
    try:
        with beam.Pipeline(options=PipelineOptions(shlex.split(config.beam))) as pipeline:
            (
                pipeline
                | "read prompts" >> beam.io.ReadFromText(prompts)
                | "spread them" >> beam.Reshuffle()
                | "synthesize" >> beam.ParDo(_Synthesize(make_workshop, outcomes, config))
            )
    except ClvrError as error:
        raise ClvrError(str(error).partition(" [while running")[0]) from error


class _Process:
    """What all copies of the function in one worker process share: the models, and whether they work."""

    def __init__(self, make_workshop: Callable[[], WorkerContext], max_failures: int):
        self.worker_context, self.health = make_workshop(), Health(max_failures)


class _Synthesize(beam.DoFn):
    """Lines of prompts -> nothing; what comes of them lies in the store."""

    def __init__(self, make_workshop: Callable[[], WorkerContext], outcomes: str, config: SynthConfig):
        self._make_workshop, self._outcomes, self._config = make_workshop, outcomes, config
        # Models are loaded once in a process, however many copies of this Beam makes in it.
        self._shared = Shared()

    def setup(self) -> None:
        """Loads the models."""
        self._process = self._shared.acquire(lambda: _Process(self._make_workshop, self._config.max_failures))
        self._health = self._process.health
        self._store = OutcomeStore(self._outcomes)
        self._pool = ThreadPoolExecutor(self._config.in_flight, thread_name_prefix="synth")
        self._running: set[Future[None]] = set()

    def process(self, line: str) -> Iterator[None]:
        """Begins a prompt, once there is room for it. Raises: ClvrError if the run stops."""
        item = item_from_json(line)
        if item.id not in self._store:
            self._collect(at_most=self._config.in_flight - 1)
            self._running.add(self._pool.submit(self._finish, item))
        return iter(())

    def finish_bundle(self) -> None:
        """A bundle is done when its prompts are. Raises: ClvrError if the run stops."""
        self._collect(at_most=0)
        held, is_written = self._health.take_held()
        for each in held:
            if is_written:
                self._write(each)
            else:
                detail = f"{each.outcome.reason}: {each.outcome.detail}"
                self._store.write_failed(each.outcome.item.id, "malformed", detail, each.usage)

    def teardown(self) -> None:
        """Lets what runs come to its end."""
        self._pool.shutdown()

    def _collect(self, at_most: int) -> None:
        """Waits until at most so many prompts run. Raises: ClvrError if the run stops, once nothing runs any more."""
        while len(self._running) > at_most:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            error = next((error for future in done if (error := future.exception()) is not None), None)
            if error is None and (verdict := self._health.verdict) is not None:
                error = ClvrError(verdict)
            if error is not None:
                # What is still made could not be kept, or would fail as well.
                self._health.stop.set()
                for future in self._running:
                    future.cancel()
                wait(self._running)
                self._running = set()
                raise error

    def _finish(self, item: PromptItem) -> None:
        meter, began = UsageTracker(stop=self._health.stop), time.monotonic()
        try:
            meter.begin()
            roles = self._process.worker_context.roles(item, meter)
            tool = meter.tool(self._process.worker_context.image_model)
            outcome = synthesize(item, roles, tool, self._config.settings, self._config.seed)
        except StoppedError:
            return
        except ProviderError as error:
            self._store.write_failed(item.id, error.fault, str(error), meter.to_json())
            self._health.failed(str(error))
            return
        held = Held(outcome, meter.to_json(), time.monotonic() - began, meter.adapted)
        if outcome.reason in UNREADABLE:
            self._health.hold(held)
            return
        for each in [held, *self._health.worked()]:
            self._write(each)

    def _write(self, held: Held) -> None:
        self._store.write(held.outcome, held.usage, held.seconds, held.adapted)
