"""The pictures of a benchmark: drawn by a system, found in our folder, or made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.benchmarks.benchmark import Benchmark, Item
from clvr_jax.evaluation.drawing import LISTED, all_drawn, draw_missing
from clvr_jax.evaluation.layout import Folder, Record
from clvr_jax.evaluation.systems import System
from clvr_jax.reasoning.images import check_image

Place = tuple[int, int]
"""Number of the prompt and of the sample, both from 0."""


@dataclass(frozen=True)
class Pictures:
    """All pictures of one run, none missing.

    Attributes:
      benchmark: whose they are.
      items: the prompts.
      samples: pictures of each.
      folder: ours; what is found out about the pictures goes there.
      files: of every picture, in order; None where a closed loop ended without one.
      records: how they were made, where we know.
      made_by: settings and seed of the run that drew them.
    """

    benchmark: Benchmark
    items: Sequence[Item]
    samples: int
    folder: Folder
    files: Mapping[Place, Path | None]
    records: Mapping[Place, Record]
    made_by: Mapping[str, Any]

    def __post_init__(self) -> None:
        bad = [f"{path} ({reason})" for path in dict.fromkeys(self.files.values()) if path and (reason := _fault(path))]
        if bad:
            more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
            raise ClvrError(f"not readable as pictures: {', '.join(bad[:LISTED])}{more}")


def draw(
    benchmark: Benchmark,
    items: Sequence[Item],
    system: System,
    out: Path,
    *,
    settings: Mapping[str, Any],
    seed: int = 0,
    samples: int,
    share: tuple[int, int] = (0, 1),
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draws what is missing, in the official layout.

    Args:
      benchmark, items: what is drawn.
      system: that draws.
      out: folder; one that holds pictures of another run is an error.
      settings: JSON values besides the system's own that identify the run.
      seed, samples, share, on_progress: see `draw_missing`.
    Raises: ClvrError, one line.
    """
    folder = Folder(out, benchmark.places(items))
    identity = {
        "benchmark": benchmark.name,
        "settings": {**system.settings, **settings},
        "seed": seed,
        "samples": samples,
    }
    folder.prepare(identity, [benchmark.metadata(item) for item in items])
    prompts = [item.prompt for item in items]
    draw_missing(folder, prompts, system.draw_all, seed, samples, system.batch_size, system.device, on_progress, share)
    benchmark.finish(folder, items, samples)


def drawn(benchmark: Benchmark, out: Path) -> Pictures:
    """What `draw` has drawn. Raises: ClvrError that lists pictures that are missing."""
    identity = Folder(out).identity()
    if identity["benchmark"] != benchmark.name:
        raise ClvrError(f"{out}: holds pictures of {identity['benchmark']}, not of {benchmark.name}")
    bare = Folder(out, benchmark.places(()))
    items = [benchmark.item(metadata, index) for index, metadata in enumerate(bare.metadata())]
    folder = Folder(out, benchmark.places(items))
    samples = identity["samples"]
    places = all_drawn(folder, [item.prompt for item in items], identity["seed"], samples)
    benchmark.finish(folder, items, samples)
    records = {place: folder.record(*place) for place in places}
    files = {
        place: benchmark.scored_file(folder, items, *place) if records[place].has_picture else None for place in places
    }
    made_by = {"settings": identity["settings"], "seed": identity["seed"]}
    return Pictures(benchmark, items, samples, folder, files, records, made_by)


def made_elsewhere(benchmark: Benchmark, items: Sequence[Item], images: Path, samples: int, out: Path) -> Pictures:
    """Pictures in the official layout that somebody else made.

    Args:
      benchmark, items: what they should show.
      images: the folder that the official scorer would be given.
      samples: of each prompt.
      out: our folder.
    Raises: ClvrError that lists pictures that are missing, and says what is expected.
    """
    benchmark.check_samples(samples)
    if not images.is_dir():
        raise UsageError(f"{images}: no such folder; --images takes the folder that the official scorer is given")
    files: dict[Place, Path | None] = {}
    missing = []
    for index, item in enumerate(items):
        for sample in range(samples):
            candidates = benchmark.made_elsewhere(images, item, sample)
            files[index, sample] = next((path for path in candidates if path.is_file()), None)
            if files[index, sample] is None:
                missing.append(candidates[0].relative_to(images).as_posix())
    if missing:
        more = " ..." if len(missing) > LISTED else ""
        raise ClvrError(
            f"{images}: {len(missing)} of {len(files)} pictures of {benchmark.title} are missing; expected are "
            f"{', '.join(dict.fromkeys(missing[:LISTED]))}{more}"
        )
    benchmark.check_elsewhere(images, items)
    made_by = {"settings": {"pictures": str(images)}, "seed": None}
    return Pictures(benchmark, items, samples, Folder(out, benchmark.places(items)), files, {}, made_by)


def _fault(path: Path) -> str | None:
    """Why a file is no picture; None if it is one, as far as its structure tells."""
    try:
        check_image(path)
    except ClvrError as error:
        return str(error).removeprefix(f"{path}: ")
    return None
