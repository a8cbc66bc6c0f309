"""A run of the engine, from prompts to a dataset.

    OUT/prompts.jsonl      the prompts of the run; refused.json has the numbers of refused ones
    OUT/outcomes/          one file for each finished prompt, kept or discarded; and one for each failed prompt
    OUT/dataset/           a TFDS dataset of the trajectories, with a split of verification examples
    OUT/statistics.json    statistics: stages that prompts reached, usage; statistics.html displays them
    OUT/dataset_card.md    description of the dataset for its users

An interrupted run can be resumed, and prompts may be added. Finished prompts are not processed again. A prompt fails,
and is not finished, if a provider fails (no connection, rate limit, no credit, no reply).
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.data.engine.intake import EvaluationPrompts, Refused, filter_prompts, item_to_json
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import RecipeConfig, RecipeWorkerContext, SynthRecipe, comparable, identity
from clvr_jax.data.engine.reporting.card import dataset_card, statistics_page
from clvr_jax.data.engine.reporting.statistics import Statistics
from clvr_jax.data.trajectories.dataset import write_dataset
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.display.console import console, progress
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import read_json, write_atomically, write_json, write_text
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.json_input import JSON, JsonObject, read_object
from clvr_jax.files.locks import locked_output
from clvr_jax.files.output_paths import check_output_directory

_PROMPTS, _REFUSED, _RUN = "prompts.jsonl", "refused.json", "synth.json"
DATASET, STATISTICS, PAGE, CARD = "dataset", "statistics.json", "statistics.html", "dataset_card.md"
_POLL_SECONDS = 2.0


def synthesize_dataset(recipe: SynthRecipe, config: RecipeConfig, out: Path) -> dict[str, Any]:
    """Synthesizes the trajectories of all prompts and writes the dataset.

    Args:
      recipe: the prompts and models.
      config: the recipe's config, with overrides.
      out: directory of the run.
    Returns: the content of statistics.json. `unfinished` has the number of failed prompts, which are not in the dataset
      until the run is resumed.
    Raises: UsageError if `out` has a run with another config; ClvrError, one line, if another process uses `out`, if
      there is no prompt or no trajectory, too many consecutive prompts fail, Apache Beam is not installed, or a file
      cannot be written.
    """
    check_output_directory(out)
    with locked_output(out):
        return _synthesize(recipe, config, out)


def _synthesize(recipe: SynthRecipe, config: RecipeConfig, out: Path) -> dict[str, Any]:
    """Implements `synthesize_dataset`; the caller holds the lock of `out`."""
    store = open_run(recipe, config, out)
    ids, refused = _write_prompts(recipe, config, out)
    _forget_failures(store, ids)
    if missing := ids - store.ids():
        if not _has_outcomes(out):
            write_json(out / _RUN, identity(recipe, config))
        console.print(f"{out}: {len(missing):,} of {len(ids):,} prompts to process")
        with _report_progress(store, ids):
            _run(recipe, config, out, store)
    finished = ids & store.ids()
    statistics = Statistics(refused)
    for id in sorted(ids - finished):
        statistics.add_failed(id, store.failed(id))
    try:
        count = write_dataset(out / DATASET, _records(recipe, store, sorted(finished), statistics), overwrite=True)
    except ClvrError as error:
        if (unfinished := statistics.unfinished_sentence) is None:
            raise
        raise ClvrError(f"{unfinished}; {error}") from error
    found = {
        "recipe": recipe.name,
        "description": recipe.description,
        "verified": config.synth.verify,
        **statistics.to_json(),
        "trajectories": count,
    }
    write_json(out / STATISTICS, found)
    write_text(out / PAGE, statistics_page(found))
    write_text(out / CARD, dataset_card(found))
    return found


def open_run(recipe: SynthRecipe, config: RecipeConfig, out: Path) -> OutcomeStore:
    """Opens the outcomes of a run. Nothing is written, so that options may be changed until there is an outcome.

    Raises: UsageError if there are outcomes of another config.
    """
    check_output_directory(out)
    if has_entry(out / _RUN) and _has_outcomes(out):
        expected, defaults = identity(recipe, config), identity(recipe, recipe.config)
        found = _with_defaults(comparable(read_json(out / _RUN)), defaults)
        if differ := sorted(_differences(found, expected)):
            raise UsageError(
                f"{out}: has a run with another {', '.join(differ)}; use the same options, or another --out"
            )
    return OutcomeStore(config.synth.outcomes or out / "outcomes")


def _has_outcomes(out: Path) -> bool:
    """Returns whether the run in a directory has any outcome, wherever they are stored."""
    if not has_entry(out / _RUN):
        return False
    empty = JsonObject({}, str(out / _RUN))
    synth = read_object(out / _RUN).nested("config", empty).nested("synth", empty)
    outcomes = synth.optional("outcomes", synth.text) if "outcomes" in synth.content else None
    return bool(OutcomeStore(outcomes or out / "outcomes").ids())


def _with_defaults(found: JSON, defaults: JSON) -> JSON:
    """Returns an identity of an earlier version with default values for the options that it did not have."""
    if not isinstance(found, dict) or not isinstance(defaults, dict):
        return found
    return {**defaults, **{name: _with_defaults(value, defaults.get(name)) for name, value in found.items()}}


def _forget_failures(store: OutcomeStore, ids: set[str]) -> None:
    """Removes outcomes in which an earlier version stored a failure of a provider, so that these prompts run again."""
    failed = [id for id in sorted(ids & store.ids()) if store.read(id).reason == "provider"]
    for id in failed:
        store.remove(id)
    if failed:
        console.print(f"{len(failed):,} prompts that failed in an earlier run are processed again")


def _write_prompts(recipe: SynthRecipe, config: RecipeConfig, out: Path) -> tuple[set[str], Counter[str]]:
    """Writes the prompts of the run. Returns: their ids, and the numbers of refused prompts by reason."""
    settings = config.synth
    evaluation = EvaluationPrompts(recipe.evaluation_prompts(config), settings.near_duplicate)
    lines, ids, refused = [], set(), Counter[str]()
    for item in filter_prompts(recipe.prompts(config), evaluation, settings.max_characters):
        if isinstance(item, Refused):
            refused[item.reason] += 1
        else:
            ids.add(item.id)
            lines.append(item_to_json(item))
    if not ids:
        why = ", ".join(f"{count} {reason}" for reason, count in refused.items()) or "the recipe gives none"
        raise ClvrError(f"{recipe.path}: no prompts to process ({why})")
    write_atomically(out / _PROMPTS, "".join(line + "\n" for line in lines).encode())
    write_json(out / _REFUSED, dict(refused))
    return ids, refused


def _run(recipe: SynthRecipe, config: RecipeConfig, out: Path, store: OutcomeStore) -> None:
    from clvr_jax.data.engine.beam_pipeline import run_pipeline

    make_context = RecipeWorkerContext.from_recipe(recipe, config)
    run_pipeline(str((out / _PROMPTS).absolute()), str(store.directory), make_context, config.synth)


def _records(
    recipe: SynthRecipe, store: OutcomeStore, ids: list[str], statistics: Statistics
) -> Iterator[TrajectoryRecord]:
    """Yields the records and verification examples in the order of ids, and adds all outcomes to the statistics."""
    with progress("writing the dataset", len(ids)) as advance:
        for number, id in enumerate(ids, start=1):
            finished = store.read(id)
            statistics.add(finished)
            if finished.is_kept:
                record = store.record(finished)
                corrected = len(record.mistakes) if recipe.corrections is None else recipe.corrections(record)
                statistics.add_corrections(len(record.mistakes), corrected)
                if recipe.audit is not None:
                    statistics.add_audit(recipe.audit(record))
                yield record
            yield from store.verification(finished)
            advance(number)


@contextmanager
def _report_progress(store: OutcomeStore, ids: set[str]) -> Iterator[None]:
    """Reports progress from the outcomes in the store, which any worker may write."""
    done, seen, statistics = threading.Event(), set[str](), Statistics()

    def poll() -> None:
        for id in sorted((store.ids() & ids) - seen):
            seen.add(id)
            statistics.add(store.read(id))

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            poll()
            advance(len(seen), statistics.summary)

    poll()
    with progress("synthesizing", len(ids), len(seen)) as advance:
        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            poll()
            advance(len(seen), statistics.summary)


def _differences(found: JSON, expected: JSON, name: str = "") -> Iterator[str]:
    """Yields the names of the values that differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in found.keys() | expected.keys():
            yield from _differences(found.get(key), expected.get(key), f"{name}.{key}" if name else key)
    elif found != expected:
        yield name.removeprefix("config.")
