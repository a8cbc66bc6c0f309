"""Generation of the images of a benchmark that do not exist yet, and the list of those that are missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.harness.run_directory import Record, RunDirectory
from clvr_jax.evaluation.systems.system import GenerateFn, SystemOutput, image_seed

Progress = Callable[[int, int], None]
"""A function of (images done, all images)."""

LISTED = 10
"""Largest number of files that an error message names."""


def generate_missing(
    directory: RunDirectory,
    prompts: Sequence[str],
    generate: GenerateFn,
    seed: int,
    samples: int,
    batch_size: int,
    device: str | None = None,
    on_progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Generates the images that are not complete, batch by batch. Each is written as soon as `generate` yields it.

    Args:
      directory: prepared for these prompts.
      prompts: in their order in the benchmark.
      generate: called only for images that do not exist yet.
      seed: of the run.
      samples: images per prompt.
      batch_size: prompts per call of `generate`.
      device: the device that generates, recorded with each image.
      on_progress: called with (images done, all images) of this share.
      share: (k, n) selects the images whose index is k modulo n, for n processes that write to one directory.
    Raises: ClvrError if `generate` returns the wrong number of results.
    """
    selected = _sample_indices(prompts, samples)[share[0] :: share[1]]
    remaining = _incomplete(directory, prompts, seed, selected)
    done = len(selected) - len(remaining)
    if on_progress:
        on_progress(done, len(selected))
    for start in range(0, len(remaining), batch_size):
        batch = remaining[start : start + batch_size]
        texts = [prompts[index] for index, _ in batch]
        seeds = [image_seed(seed, prompts[index], sample) for index, sample in batch]
        began = time.monotonic()
        results = generate(texts, seeds)
        batch_seconds_per_image = (time.monotonic() - began) / len(batch)
        count = 0
        for count, result in enumerate(results, start=1):
            if count > len(batch):
                break
            output, (index, sample) = SystemOutput.from_result(result), batch[count - 1]
            seconds = batch_seconds_per_image if output.seconds is None else output.seconds
            record = Record.from_output(output, texts[count - 1], seeds[count - 1], seconds, device)
            directory.add(index, sample, output, record)
        if count != len(batch):
            raise ClvrError(f"benchmark: asked the system for {len(batch)} images and got {count}")
        done += len(batch)
        if on_progress:
            on_progress(done, len(selected))


def complete_samples(directory: RunDirectory, prompts: Sequence[str], seed: int, samples: int) -> list[tuple[int, int]]:
    """Returns (prompt index, sample index) of all images, in order.

    Raises: ClvrError that lists missing images, because a score over fewer images is not comparable.
    """
    indices = _sample_indices(prompts, samples)
    if missing := _incomplete(directory, prompts, seed, indices):
        names = ", ".join(directory.layout.image(*each).as_posix() for each in missing[:LISTED])
        more = " ..." if len(missing) > LISTED else ""
        raise ClvrError(
            f"{directory.root}: {len(missing)} of {len(indices)} images are missing ({names}{more}); run the benchmark "
            "again to generate them"
        )
    return indices


def _sample_indices(prompts: Sequence[str], samples: int) -> list[tuple[int, int]]:
    return [(index, sample) for index in range(len(prompts)) for sample in range(samples)]


def _incomplete(
    directory: RunDirectory, prompts: Sequence[str], seed: int, indices: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    return [
        (index, sample)
        for index, sample in indices
        if not directory.is_complete(index, sample, prompts[index], image_seed(seed, prompts[index], sample))
    ]
