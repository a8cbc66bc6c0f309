"""Trajectories of the oracle with the trained image generator, whose mistakes a controller has to verify.

The prompts are training prompts. Nothing is rolled back, so every trajectory is one sequence of replies and images. The
same command with the same model resumes an interrupted run.

    python -m clvr_jax.scripts.shapes_rollouts --out runs/shapes_rollouts

`python -m clvr_jax.data.shapes_proxies` makes a dataset for Proxy Prompt RL of them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.arguments import run_script
from clvr_jax.display.console import progress
from clvr_jax.errors import UsageError
from clvr_jax.evaluation.systems.models import Oracle
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.output_paths import check_directory
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.reasoning.loop import loop
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.worlds.shapes.prompts import train_prompt


def main(
    out: Path = Path("runs/shapes_rollouts"),
    model: str = "runs/shapes_sft/export",
    count: int = 384,
    batch: int = 32,
    seed: int = 1,
    tiers: tuple[int, ...] = (),
    steps: int | None = None,
) -> None:
    """Generates trajectories with the oracle as controller, and writes each to a directory of its own.

    Args:
      out: Write the trajectories to this directory.
      model: Image generator, a shipped name or a pipeline directory.
      count: Number of trajectories.
      batch: Generate this many trajectories together.
      seed: The same seed gives the same prompts and noise.
      tiers: Use only complex prompts with these numbers of objects, up to 9; all kinds of prompts if none is given.
      steps: Number of sampler steps; the model's own if it is not given.
    """
    identity = {"model": model, "seed": seed, **({"tiers": list(tiers)} if tiers else {})}
    identity |= {"steps": steps} if steps else {}
    path = check_directory(out) / "rollouts.json"
    if not path.exists():
        write_json(path, identity)
    elif (found := read_json(path)) != identity:
        raise UsageError(f"{out}: holds trajectories of {found}, not of {identity}; choose another --out")
    image_generator = Flux2ImageGenerator(Flux2Pipeline.from_pretrained(model), steps)
    chosen: dict[str, Any] = {"weights": {"complex": 1.0}, "tiers": tiers} if tiers else {}
    with progress("shapes rollouts", count) as advance:
        for start in range(0, count, batch):
            numbers = range(start, min(start + batch, count))
            directories = [out / f"{number:05d}" for number in numbers]
            if not all((directory / "trajectory.json").exists() for directory in directories):
                metadata = [train_prompt(np.random.default_rng((seed, number)), **chosen) for number in numbers]
                prompts = [entry["prompt"] for entry in metadata]
                budget = Budget(max_steps=8, max_rollbacks=0)
                trajectories = loop.run(prompts, Oracle(metadata), image_generator, budget, list(numbers), model=model)
                for directory, trajectory in zip(directories, trajectories, strict=True):
                    trajectory.save(directory)
            advance(numbers.stop)


if __name__ == "__main__":
    run_script(main)
