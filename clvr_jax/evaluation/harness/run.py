"""A run of a benchmark: a system generates the images that are missing, and a scorer scores all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from clvr_jax.evaluation.harness.benchmark import Benchmark, Item
from clvr_jax.evaluation.harness.generation import Progress
from clvr_jax.evaluation.harness.images import generate_images, load_generated
from clvr_jax.evaluation.harness.results import Results
from clvr_jax.evaluation.harness.scoring import Scorer, score_images
from clvr_jax.evaluation.systems.system import System
from clvr_jax.files.json_input import JSON


def run(
    benchmark: Benchmark,
    items: Sequence[Item],
    system: System,
    out: str | os.PathLike[str],
    scorer: Scorer,
    *,
    settings: Mapping[str, JSON] | None = None,
    seed: int = 0,
    samples: int | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Generates the images that are missing in `out`, scores all images and writes results.json.

    Args:
      benchmark: the benchmark.
      items: its prompts.
      system: generates the images; called only for images that do not exist yet.
      out: the run directory; one with images of other settings, prompts, seed or number of samples is an error.
      scorer: scores the images as they are on disk.
      settings: JSON values that identify the run, such as the name of the set of prompts, beside the system's own.
      seed: of the run; the seed of an image depends only on it, the prompt and the sample index.
      samples: images of each prompt; the benchmark's own number if None.
      on_progress: called with (images done, all images) of generation.
    Returns: the content of results.json; see `score_images`.
    Raises: ClvrError, one line.
    """
    count = benchmark.samples if samples is None else samples
    root = Path(out)
    generate_images(
        benchmark, items, system, root, settings=settings or {}, seed=seed, samples=count, on_progress=on_progress
    )
    return score_images(load_generated(benchmark, root), scorer)
