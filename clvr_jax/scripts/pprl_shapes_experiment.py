"""Measures PPRL in the shapes world against simple RL and the initial model, with several seeds and paired tests.

    python -m clvr_jax.scripts.pprl_shapes_experiment --out runs/pprl_experiment

Rollouts of the oracle with the initial model, mistakes included, become a dataset of steps. Every arm trains on it with
every seed, from the same initial model with the same number of samples. Each model then generates the evaluation sets
in the closed loop with the oracle as controller, in 28 steps an image and with the same number of images. The same
command resumes an interrupted experiment (`timeout 50m ...`); each part is a command line that is printed before it
runs. For every image the report also says whether its edits were made, and whether everything else was left unchanged.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from clvr_jax import cli
from clvr_jax.arguments import run_script
from clvr_jax.data import shapes_proxies
from clvr_jax.display.console import console
from clvr_jax.display.tables import Table
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.comparison.pairs import Comparison, compare, comparison_table, load_results
from clvr_jax.evaluation.harness.results import PooledResults
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.files.atomic_io import write_atomically, write_json
from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from clvr_jax.rewards import ShapesJudge
from clvr_jax.scripts import shapes_rollouts
from clvr_jax.worlds.shapes.oracle import apply_edits, canvas_text, edit_text, parse_edits

ARMS = {"pprl": (), "simple": ("--simple",), "grpo": ("--train.algorithm", "grpo")}
START = "sft"
"""The name of the initial model in reports."""


def main(
    out: Path = Path("runs/pprl_experiment"),
    model: str = "shapes-tiny-sft",
    arms: tuple[Literal["pprl", "simple", "grpo"], ...] = ("pprl", "simple"),
    seeds: tuple[int, ...] = (0, 1, 2),
    trajectories: int = 256,
    tiers: tuple[int, ...] = (5, 6, 7, 8, 9),
    splits: tuple[str, ...] = ("dense", "complex", "eval"),
    max_steps: int = 5,
    limit: int | None = None,
    options: str = "",
) -> None:
    """Makes the dataset, trains all arms, evaluates them, and writes the report.

    Args:
      out: Write everything to this directory; the report is report.md and report.json.
      model: Start from this model: a shipped name or a pipeline directory.
      arms: Train these arms: PPRL, simple RL, or Flow-GRPO.
      seeds: Train each arm once with each of these seeds, and generate the evaluation images with the same seed.
      trajectories: Number of trajectories in the dataset.
      tiers: Numbers of objects in the prompts of the dataset.
      splits: Evaluate on these sets of prompts.
      max_steps: Generate at most this many images for a prompt of the evaluation.
      limit: Use at most this many prompts of each set; all of them if it is not given.
      options: Pass these options to `clvr train configs/pprl_shapes.py`, in one string such as "--sampler.steps 4".
    """
    dataset = out / "dataset"
    if not dataset.exists():
        shapes_rollouts.main(out / "rollouts", model, trajectories, tiers=tiers)
        shapes_proxies.main(out / "rollouts", dataset)
    names = (START, *arms)
    for seed in seeds:
        for name in names:
            run = out / f"{name}-{seed}"
            if name != START and not (run / "export").exists():
                _clvr(*training(model, dataset, name, seed, run), *shlex.split(options))
                if not (run / "export").exists():
                    raise ClvrError(f"{run}: the training was interrupted; the same command resumes it")
            for split in splits:
                directory = _evaluation_directory(out, name, split, seed)
                if not (directory / "results.json").exists():
                    image_generator = model if name == START else str(run / "export")
                    few = ("--limit", str(limit)) if limit else ()
                    _clvr(*evaluation(image_generator, split, seed, max_steps, directory), *few)
    comparisons, page = report(out, names, splits, seeds)
    write_json(out / "report.json", comparisons)
    write_atomically(out / "report.md", page.encode())
    print(page)


def training(model: str, dataset: Path, arm: str, seed: int, out: Path) -> tuple[str, ...]:
    """Returns the command line that trains an arm, or resumes it."""
    start = ("--model", model, "--dataset", str(dataset), "--train.seed", str(seed), *ARMS[arm])
    return ("train", "pprl_shapes", *start, "--out", str(out), "--resume")


def evaluation(model: str, split: str, seed: int, max_steps: int, out: Path) -> tuple[str, ...]:
    """Returns the command line that evaluates a model with the oracle, or resumes it."""
    loop = ("--mode", "closed-loop", "--controller", "oracle", "--max-steps", str(max_steps))
    return ("eval", "shapes", "--model", model, *loop, "--split", split, "--seed", str(seed), "--out", str(out))


SplitReport = dict[str, dict[str, dict[str, float]] | Comparison]
"""The scores of single steps of each system under "steps", and comparisons of two systems under their names."""


def report(
    out: Path, names: Sequence[str], splits: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[str, SplitReport], str]:
    """Compares every other system with the first arm, over prompts, and measures single generation steps.

    The score of a prompt is the mean over the seeds, so that seeds are not counted as independent prompts.

    Returns: for JSON, and as Markdown.
    """
    comparisons: dict[str, SplitReport] = {}
    lines = []
    for split in splits:
        results = {name: _over_seeds(out, name, split, seeds) for name in names}
        steps = {name: _steps(out, name, split, seeds) for name in names}
        own: SplitReport = {"steps": steps}
        rows = []
        for name, marks in steps.items():
            shares = ", ".join(f"{share:.3f}" for share in _by_seed(out, name, split, seeds))
            rows.append((name, shares, f"{marks['success']:.4f}", f"{marks['preservation']:.4f}"))
        table = Table(("", "right by seed", "edits made", "all else left alone"), [rows])
        lines += [f"## {split}", "", *table.markdown()]
        best = names[1]
        for name in names:
            if name != best:
                comparison = compare(results[name], results[best])
                own[f"{name} and {best}"] = comparison
                lines += ["", *comparison_table(comparison, name, best).markdown()]
        comparisons[split] = own
        lines.append("")
    return comparisons, "\n".join(lines)


@dataclass(frozen=True)
class Marks:
    """Scores of one image: whether all its edits were made, and, of edits, whether all other cells are unchanged."""

    success: bool
    preservation: bool | None


def marks(trajectory: Trajectory) -> Iterator[Marks]:
    """Yields the scores of each image whose reply requests edits in the language of the world."""
    judge = ShapesJudge()
    for step in trajectory.generated:
        edits = parse_edits(step.reasoning)
        assert step.image is not None
        source = trajectory.steps[step.references[-1]].image if step.references else None
        if not edits:
            continue
        if source is None:
            yield Marks(judge.score_image(step.image, canvas_text(apply_edits((), edits))).value == 1, None)
        else:
            parts = judge.score_edit(source, step.image, edit_text(edits)).parts
            yield Marks(parts["success"] == 1, parts["preservation"] == 1)


def _steps(out: Path, name: str, split: str, seeds: Sequence[int]) -> dict[str, float]:
    """Returns the number of images, and the shares of those with right edits and unchanged other cells."""
    directories = [RunDirectory(_evaluation_directory(out, name, split, seed)) for seed in seeds]
    trajectories = (
        directory.trajectory(index, 0) for directory in directories for index in range(len(directory.metadata()))
    )
    found = [each for trajectory in trajectories if trajectory is not None for each in marks(trajectory)]
    kept = [each.preservation for each in found if each.preservation is not None]
    return {
        "drawings": len(found),
        "success": float(np.mean([each.success for each in found])),
        "preservation": float(np.mean(kept)),
    }


def _over_seeds(out: Path, name: str, split: str, seeds: Sequence[int]) -> PooledResults:
    """Merges the results of all seeds into one, with several images for each prompt."""
    found = [load_results(_evaluation_directory(out, name, split, seed)) for seed in seeds]
    images = [image for one in found for image in one["pictures"]]
    return {"benchmark": found[0]["benchmark"], "judge": found[0]["judge"], "pictures": images}


def _by_seed(out: Path, name: str, split: str, seeds: Sequence[int]) -> list[float]:
    found = [load_results(_evaluation_directory(out, name, split, seed))["pictures"] for seed in seeds]
    return [float(np.mean([image["correct"] for image in images])) for images in found]


def _evaluation_directory(out: Path, name: str, split: str, seed: int) -> Path:
    return out / "eval" / f"{name}-{split}-{seed}"


def _clvr(*arguments: str) -> None:
    console.print(f"clvr {shlex.join(arguments)}", highlight=False, soft_wrap=True)
    if cli.main(arguments) != 0:
        raise ClvrError(f"clvr {arguments[0]} failed; the same command resumes the experiment")


if __name__ == "__main__":
    run_script(main)
