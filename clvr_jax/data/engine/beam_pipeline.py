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

from clvr_jax.data.engine.engine import synthesize
from clvr_jax.data.engine.intake import item_from_json
from clvr_jax.data.engine.metering import Meter
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import SynthConfig, Workshop
from clvr_jax.data.engine.roles import PromptItem
from clvr_jax.errors import ClvrError


def run_pipeline(prompts: str, outcomes: str, make_workshop: Callable[[], Workshop], config: SynthConfig) -> None:
    """Works on every prompt that has no outcome yet; returns when all have one.

    Args:
      prompts: JSON lines as `intake.item_to_json` writes them, where all workers can read them.
      outcomes: folder or bucket that all workers can write.
      make_workshop: called once in each worker process; must be picklable for workers elsewhere.
      config: budgets, prompts in flight, and the options of Beam.
    Raises: whatever a worker raised that is no outcome of a prompt, as far as Beam lets it through.
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


class _Synthesize(beam.DoFn):
    """Lines of prompts -> nothing; what comes of them lies in the store."""

    def __init__(self, make_workshop: Callable[[], Workshop], outcomes: str, config: SynthConfig):
        self._make_workshop, self._outcomes, self._config = make_workshop, outcomes, config
        # Models are loaded once in a process, however many copies of this Beam makes in it.
        self._shared = Shared()

    def setup(self) -> None:
        """Loads the models."""
        self._workshop = self._shared.acquire(self._make_workshop)
        self._store = OutcomeStore(self._outcomes)
        self._pool = ThreadPoolExecutor(self._config.in_flight, thread_name_prefix="synth")
        self._running: set[Future[None]] = set()

    def process(self, line: str) -> Iterator[None]:
        """Begins a prompt, once there is room for it."""
        item = item_from_json(line)
        if item.id not in self._store:
            self._collect(at_most=self._config.in_flight - 1)
            self._running.add(self._pool.submit(self._finish, item))
        return iter(())

    def finish_bundle(self) -> None:
        """A bundle is done when its prompts are."""
        self._collect(at_most=0)

    def teardown(self) -> None:
        """Lets what runs come to its end."""
        self._pool.shutdown()

    def _collect(self, at_most: int) -> None:
        while len(self._running) > at_most:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def _finish(self, item: PromptItem) -> None:
        meter, began = Meter(), time.monotonic()
        crew = self._workshop.crew(item, meter)
        tool = meter.tool(self._workshop.image_tool)
        outcome = synthesize(item, crew, tool, self._config.settings, self._config.seed)
        self._store.write(outcome, meter.to_json(), time.monotonic() - began)
