"""A run of the engine, from prompts to a dataset.

    OUT/prompts.jsonl      the prompts that are worked on; the others are counted in refused.json
    OUT/outcomes/          one file for each finished prompt, kept or not; and a note for each that a provider failed
    OUT/dataset/           what was kept, as a TFDS dataset of trajectories; and verification examples, a split of it
    OUT/statistics.json    how many got how far, and at what price; statistics.html shows it
    OUT/dataset_card.md    what the dataset is, for those who find it

A run that was stopped anywhere goes on; more prompts may be added. What is already finished is not made again. A
prompt that a provider failed (no connection, rate limit, no money, no reply) is not finished.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.console import console, progress
from clvr_jax.data.engine.card import dataset_card, statistics_page
from clvr_jax.data.engine.intake import EvaluationPrompts, Refused, filter_prompts, item_to_json
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import RecipeWorkerContext, SynthRecipe, comparable, identity
from clvr_jax.data.engine.statistics import Statistics
from clvr_jax.data.trajectory_dataset import write_dataset
from clvr_jax.data.trajectory_record import TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import read_json, write_atomically, write_json, write_text
from clvr_jax.locks import locked_output
from clvr_jax.outputs import check_folder

_PROMPTS, _REFUSED, _RUN = "prompts.jsonl", "refused.json", "synth.json"
DATASET, STATISTICS, PAGE, CARD = "dataset", "statistics.json", "statistics.html", "dataset_card.md"
_SECONDS_BETWEEN_LOOKS = 2.0


def synthesize_dataset(recipe: SynthRecipe, config: Any, out: Path) -> dict[str, Any]:
    """Makes the trajectories of all prompts, and the dataset.

    Args:
      recipe: which prompts and models.
      config: the recipe's config, with overrides.
      out: folder of the run.
    Returns: the statistics, as they stand in statistics.json.
      `unfinished` there counts the prompts that providers failed; the dataset lacks them until the next run.
    Raises: UsageError if another run is in `out`; ClvrError, one line, if another process works there, if there is no
      prompt or no trajectory, too many prompts fail in a row, Apache Beam is not installed, or something cannot be
      written.
    """
    check_folder(out)
    with locked_output(out):
        return _synthesize(recipe, config, out)


def _synthesize(recipe: SynthRecipe, config: Any, out: Path) -> dict[str, Any]:
    """`synthesize_dataset`, with the lock of `out` held."""
    store = open_run(recipe, config, out)
    ids, refused = _take_in(recipe, config, out)
    _forget_failures(store, ids)
    if missing := ids - store.ids():
        if not _has_outcomes(out):
            write_json(out / _RUN, identity(recipe, config))
        console.print(f"{out}: {len(missing):,} of {len(ids):,} prompts to be worked on")
        with _watched(store, ids):
            _run(recipe, config, out, store)
    finished = ids & store.ids()
    statistics = Statistics(refused)
    for id in sorted(ids - finished):
        statistics.add_failed(id, store.failed(id))
    try:
        count = write_dataset(out / DATASET, _kept(recipe, store, sorted(finished), statistics), overwrite=True)
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


def open_run(recipe: SynthRecipe, config: Any, out: Path) -> OutcomeStore:
    """The outcomes in a run's folder. Nothing is written: options may be corrected until there is an outcome.

    Raises: UsageError if outcomes of another config are there.
    """
    check_folder(out)
    if (out / _RUN).exists() and _has_outcomes(out):
        wanted, usual = identity(recipe, config), identity(recipe, recipe.config)
        found = _completed(comparable(read_json(out / _RUN)), usual)
        if differ := sorted(_differences(found, wanted)):
            raise UsageError(
                f"{out}: a run with another {', '.join(differ)} is here; give the same options, or another --out"
            )
    return OutcomeStore(config.synth.outcomes or out / "outcomes")


def _has_outcomes(out: Path) -> bool:
    """Whether the run in a directory has any outcome yet, wherever it keeps them."""
    if not (out / _RUN).exists():
        return False
    synth = read_json(out / _RUN).get("config", {}).get("synth", {})
    return bool(OutcomeStore(synth.get("outcomes") or out / "outcomes").ids())


def _completed(found: Any, usual: Any) -> Any:
    """An identity that an earlier version wrote, with the usual values of options that it did not have."""
    if not isinstance(found, dict) or not isinstance(usual, dict):
        return found
    return {**usual, **{name: _completed(value, usual.get(name)) for name, value in found.items()}}


def _forget_failures(store: OutcomeStore, ids: set[str]) -> None:
    """Removes outcomes of an earlier version that only say that a provider failed, so that it is asked again."""
    failed = [id for id in sorted(ids & store.ids()) if store.read(id).reason == "provider"]
    for id in failed:
        store.remove(id)
    if failed:
        console.print(f"{len(failed):,} prompts that a provider failed in an earlier run are worked on again")


def _take_in(recipe: SynthRecipe, config: Any, out: Path) -> tuple[set[str], Counter[str]]:
    """Writes the prompts that are to be worked on; their ids, and how many were refused for what reason."""
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
        raise ClvrError(f"{recipe.path}: no prompts to work on ({why})")
    write_atomically(out / _PROMPTS, "".join(line + "\n" for line in lines).encode())
    write_json(out / _REFUSED, dict(refused))
    return ids, refused


def _run(recipe: SynthRecipe, config: Any, out: Path, store: OutcomeStore) -> None:
    from clvr_jax.data.engine.beam_pipeline import run_pipeline

    make_context = RecipeWorkerContext.of(recipe, config)
    run_pipeline(str((out / _PROMPTS).absolute()), str(store.folder), make_context, config.synth)


def _kept(
    recipe: SynthRecipe, store: OutcomeStore, ids: list[str], statistics: Statistics
) -> Iterator[TrajectoryRecord]:
    """The records in the order of ids, verification examples too; all outcomes are counted on the way."""
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
def _watched(store: OutcomeStore, ids: set[str]) -> Iterator[None]:
    """Shows progress by the outcomes that appear, whoever makes them and wherever."""
    over, seen, statistics = threading.Event(), set[str](), Statistics()

    def look() -> None:
        for id in sorted((store.ids() & ids) - seen):
            seen.add(id)
            statistics.add(store.read(id))

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            look()
            advance(len(seen), statistics.summary)

    look()
    with progress("synthesizing", len(ids), len(seen)) as advance:
        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            look()
            advance(len(seen), statistics.summary)


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Names of the values that differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in found.keys() | wanted.keys():
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield name.removeprefix("config.")
