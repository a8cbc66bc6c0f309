"""What the data engine costs beside the models it calls, and whether it keeps them busy.

PYTHONPATH=. python benchmarks/bench_synth.py

* Many prompts at once against an endpoint on loopback that answers after 200 ms: requests that have arrived and are not
  answered yet, looked at every 50 ms, on average over the middle half of the time (the target is 50 of 64). The engine
  runs as `clvr synth` runs it, by Beam in two worker processes: one is limited by its interpreter's lock.
* One prompt after another against the same endpoint: the share of the time that is not spent waiting for it (the target
  is 5 %).

The server is a process of its own.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from endpoint import endpoint

from clvr_jax.configs import prompted_synth
from clvr_jax.data.engine.beam_pipeline import run_pipeline
from clvr_jax.data.engine.engine import synthesize
from clvr_jax.data.engine.intake import item_to_json
from clvr_jax.data.engine.metering import UsageTracker
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import RecipeWorkerContext, SynthConfig, WorkerContext, load_synth_recipe
from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.providers.endpoint import Endpoint
from tests.data.engine.cooperative_server import reply_to
from tests.providers.server import KEY


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--alone", type=int, default=8, help="prompts of the second measurement")
    parser.add_argument("--in-flight", type=int, default=64, help="prompts at once, in all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds before the endpoint answers")
    options = parser.parse_args()
    os.environ["LOOPBACK_KEY"] = KEY
    with endpoint(_answer, options.delay) as server, tempfile.TemporaryDirectory() as folder:
        model = Endpoint("tiny", server.url, "LOOPBACK_KEY", max_in_flight=options.in_flight)
        roles = dict.fromkeys(("director", "verifier", "second_judge", "images"), model)
        beam = f"--direct_num_workers {options.workers} --direct_running_mode multi_processing"
        synth = SynthConfig(in_flight=options.in_flight // options.workers, beam=beam if options.workers > 1 else "")
        config = dataclasses.replace(prompted_synth.CONFIG, **roles, image_size=(8, 8), synth=synth)
        store = OutcomeStore(Path(folder) / "outcomes")
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text("".join(item_to_json(_item(number)) + "\n" for number in range(options.prompts)))
        recipe = load_synth_recipe(Path(prompted_synth.__file__))
        run_pipeline(str(prompts), str(store.directory), RecipeWorkerContext.from_recipe(recipe, config), synth)
        requests, in_flight = server.seen()
        assert len(store.ids()) == options.prompts
        middle = in_flight[len(in_flight) // 4 : -len(in_flight) // 4]
        print(
            f"{options.prompts} prompts, {options.in_flight} at once in {options.workers} processes, "
            f"{requests} requests of {options.delay} s: {np.mean(middle):.1f} in flight on average, "
            f"{np.percentile(middle, 5):.0f} or more in 95 % of the time"
        )
        workshop = prompted_synth.workshop(config)
        seconds, of_models = np.sum([_one(workshop, store, -1 - number) for number in range(options.alone)], axis=0)
    print(f"one by one: {seconds / options.alone:.2f} s a prompt, {1 - of_models / seconds:.1%} of it in the engine")


def _item(number: int) -> PromptItem:
    return PromptItem(f"p{number}", f"a light color, number {number}")


def _answer(path: str, request: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = reply_to(path, request).content
    return content


def _one(workshop: WorkerContext, store: OutcomeStore, number: int) -> tuple[float, float]:
    """Seconds of a prompt, and of them those in calls of models."""
    item, tracker, began = _item(number), UsageTracker(), time.monotonic()
    outcome = synthesize(item, workshop.crew(item, tracker), tracker.image_model(workshop.image_model))
    assert outcome.stage == "kept", outcome.detail
    store.write(outcome, tracker.to_json(), time.monotonic() - began)
    return time.monotonic() - began, tracker.total.seconds


if __name__ == "__main__":
    main()
