"""Draws the pictures of a benchmark that are not there yet, and says which are missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.drawn import DrawAll, Drawn, picture_seed
from clvr_jax.evaluation.layout import Folder, Record

LISTED = 10


def draw_missing(
    folder: Folder,
    prompts: Sequence[str],
    draw_all: DrawAll,
    seed: int,
    samples: int,
    batch_size: int,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Draws what is not complete, batch by batch. A picture is written as soon as `draw_all` returns or yields it.

    Args:
      folder: prepared for these prompts.
      prompts: in their order in the benchmark.
      draw_all: see `Drawn`; never called for pictures that are there already.
      seed, samples: of the run.
      batch_size: prompts of a call.
      device: what draws, recorded with each picture.
      on_progress: called with (pictures done, pictures in all) of this share.
      share: (k, n): of all pictures only those whose number is k modulo n; for n processes that write to one folder.
    """
    wanted = _places(prompts, samples)[share[0] :: share[1]]
    left = _incomplete(folder, prompts, seed, wanted)
    done = len(wanted) - len(left)
    if on_progress:
        on_progress(done, len(wanted))
    for start in range(0, len(left), batch_size):
        batch = left[start : start + batch_size]
        texts = [prompts[index] for index, _ in batch]
        seeds = [picture_seed(seed, prompts[index], sample) for index, sample in batch]
        began = time.monotonic()
        results = draw_all(texts, seeds)
        share_of_batch = (time.monotonic() - began) / len(batch)
        got = 0
        for got, result in enumerate(results, start=1):
            if got > len(batch):
                break
            drawn, (index, sample) = Drawn.of(result), batch[got - 1]
            seconds = share_of_batch if drawn.seconds is None else drawn.seconds
            folder.add(index, sample, drawn, Record.of(drawn, texts[got - 1], seeds[got - 1], seconds, device))
        if got != len(batch):
            raise ClvrError(f"benchmark: asked for {len(batch)} pictures and got {got}")
        done += len(batch)
        if on_progress:
            on_progress(done, len(wanted))


def all_drawn(folder: Folder, prompts: Sequence[str], seed: int, samples: int) -> list[tuple[int, int]]:
    """(number of the prompt, number of the sample) of all pictures, in order.

    Raises: ClvrError that lists what is missing: a score over fewer pictures would be another score.
    """
    places = _places(prompts, samples)
    if missing := _incomplete(folder, prompts, seed, places):
        raise pictures_missing(folder, missing, len(places), "run the benchmark again to draw them")
    return places


def pictures_missing(folder: Folder, missing: Sequence[tuple[int, int]], total: int, advice: str) -> ClvrError:
    """The error that lists them, on one line."""
    names = ", ".join(folder.places.picture(*place).as_posix() for place in missing[:LISTED])
    more = " ..." if len(missing) > LISTED else ""
    return ClvrError(f"{folder.root}: {len(missing)} of {total} pictures are missing ({names}{more}); {advice}")


def _places(prompts: Sequence[str], samples: int) -> list[tuple[int, int]]:
    return [(index, sample) for index in range(len(prompts)) for sample in range(samples)]


def _incomplete(
    folder: Folder, prompts: Sequence[str], seed: int, places: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    return [
        (index, sample)
        for index, sample in places
        if not folder.is_complete(index, sample, prompts[index], picture_seed(seed, prompts[index], sample))
    ]
