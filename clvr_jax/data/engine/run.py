"""A run of the engine, from prompts to a dataset.

    OUT/prompts.jsonl      the prompts that are worked on; the others are counted in refused.json
    OUT/outcomes/          one file for each finished prompt, kept or not
    OUT/dataset/           what was kept, as a TFDS dataset of trajectories; and verification examples, a split of it
    OUT/statistics.json    how many got how far, and at what price; statistics.html shows it
    OUT/dataset_card.md    what the dataset is, for those who find it

A run that was stopped anywhere goes on; more prompts may be added. What is already finished is not made again.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clvr_jax.console import console, progress
from clvr_jax.data.engine.card import dataset_card, statistics_page
from clvr_jax.data.engine.intake import EvaluationPrompts, Refused, item_to_json, sift
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import RecipeWorkshop, SynthRecipe, identity
from clvr_jax.data.engine.statistics import Statistics
from clvr_jax.data.trajectory_dataset import write_dataset
from clvr_jax.data.trajectory_record import TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import read_json, write_atomically, write_json
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
    Raises: UsageError if another run is in `out`; ClvrError, one line, if there is no prompt or no trajectory, Apache
      Beam is not installed, or something cannot be written.
    """
    store = open_run(recipe, config, out)
    ids, refused = _take_in(recipe, config, out)
    if missing := ids - store.ids():
        console.print(f"{out}: {len(missing):,} of {len(ids):,} prompts to be worked on")
        with _watched(store, ids):
            _run(recipe, config, out, store)
    statistics = Statistics(refused)
    count = write_dataset(out / DATASET, _kept(recipe, store, sorted(ids), statistics), overwrite=True)
    found = {
        "recipe": recipe.name,
        "description": recipe.description,
        "verified": config.synth.verify,
        **statistics.to_json(),
        "trajectories": count,
    }
    write_json(out / STATISTICS, found)
    write_atomically(out / PAGE, statistics_page(found).encode())
    write_atomically(out / CARD, dataset_card(found).encode())
    return found


def open_run(recipe: SynthRecipe, config: Any, out: Path) -> OutcomeStore:
    """The outcomes in a run's folder, which is made if need be.

    Raises: UsageError if a run with another config is there.
    """
    check_folder(out)
    wanted = identity(recipe, config)
    if not (out / _RUN).exists():
        write_json(out / _RUN, wanted)
    elif (found := read_json(out / _RUN)) != wanted:
        differ = sorted(_differences(found, wanted))
        raise UsageError(
            f"{out}: a run with another {', '.join(differ)} is here; give the same options, or another --out"
        )
    return OutcomeStore(config.synth.outcomes or out / "outcomes")


def _take_in(recipe: SynthRecipe, config: Any, out: Path) -> tuple[set[str], Counter[str]]:
    """Writes the prompts that are to be worked on; their ids, and how many were refused for what reason."""
    settings = config.synth
    evaluation = EvaluationPrompts(recipe.evaluation_prompts(config), settings.near_duplicate)
    lines, ids, refused = [], set(), Counter[str]()
    for item in sift(recipe.prompts(config), evaluation, settings.max_characters):
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

    make_workshop = RecipeWorkshop.of(recipe, config)
    run_pipeline(str((out / _PROMPTS).absolute()), str(store.folder), make_workshop, config.synth)


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
