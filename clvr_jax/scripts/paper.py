"""The paper's tables in miniature: the shapes world's models in all modes, compared, into docs/results.md with plots.

    make paper
    python -m clvr_jax.scripts.paper --distilled runs/shapes_distill/export --pprl runs/pprl/export --out runs/paper

The same command resumes an interrupted run; with another model it generates only the images that this changes. The
model trained by PPRL is merged if there is one, else the fine-tuned model; `--aligned sft` always merges the latter.
`--limit 60` gives a quick estimate. It needs matplotlib (`pip install clvr-jax[plots]`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from clvr_jax.arguments import at_least_one, check_seed, run_script
from clvr_jax.compilation import enable_compilation_cache
from clvr_jax.display.plots import can_plot
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.benchmarks.shapes import shapes_checker
from clvr_jax.evaluation.comparison.scaling import from_trajectories
from clvr_jax.evaluation.comparison.systems import SystemResults
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.evaluation.paper.corrections import Corrections, count_corrections
from clvr_jax.evaluation.paper.diagnosis import Interactions, interactions
from clvr_jax.evaluation.paper.models import Sources, model_directories
from clvr_jax.evaluation.paper.page import Measured, Section, write_page
from clvr_jax.evaluation.paper.rows import SPLITS, Prompts, Row, results
from clvr_jax.evaluation.paper.stages import Stages, digest
from clvr_jax.evaluation.paper.timing import GroupTime, loop_times, times_by_image_count
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.output_paths import check_directory, check_file
from clvr_jax.merging.planning import REPORT
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.worlds.shapes.metadata import Metadata

BEST_OF = Budget(candidates=8)
ROWS = {
    "base-one-shot": Row("base, one shot", "base", "one-shot"),
    "distilled-one-shot": Row("distilled, one shot", "distilled", "one-shot"),
    "base-open-loop": Row("base, open loop", "base", "open-loop"),
    "aligned-open-loop": Row("aligned, open loop", "aligned", "open-loop"),
    "merged-open-loop": Row("merged, open loop", "merged", "open-loop"),
    "base-loop": Row("base, loop", "base"),
    "sft-loop": Row("SFT, loop", "sft"),
    "pprl-loop": Row("SFT + PPRL, loop", "pprl"),
    "distilled-loop": Row("distilled only, loop", "distilled"),
    "merged-loop": Row("merged (DSWM), loop", "merged"),
    "merged-blind": Row("merged (DSWM), blind loop", "merged", is_blind=True),
    "merged-controller": Row("merged (DSWM), controller accepts", "merged", verification="controller"),
    "merged-unverified": Row("merged (DSWM), no verification", "merged", verification="none"),
    "merged-exact": Row("merged (DSWM), detector describes", "merged", has_exact_descriptions=True),
    "distilled-blind": Row("distilled only, blind loop", "distilled", is_blind=True),
    "merged-dense": Row("merged (DSWM), loop", "merged", splits=("dense",)),
    "merged-best-of": Row("merged, best of 8", "merged", "best-of", budget=BEST_OF, splits=("complex",)),
    "distilled-oracle": Row("distilled only, oracle", "distilled", controller="oracle"),
    "aligned-oracle": Row("aligned, oracle", "aligned", controller="oracle"),
    "few-oracle": Row("aligned in as few steps, oracle", "aligned in few steps", controller="oracle"),
    "merged-oracle": Row("merged (DSWM), oracle", "merged", controller="oracle"),
    "linear-oracle": Row("average of the two, oracle", "linear", controller="oracle"),
    "ties-oracle": Row("TIES, oracle", "ties", controller="oracle"),
    "dare-oracle": Row("DARE, oracle", "dare", controller="oracle"),
}
MERGING = tuple(name for name in ROWS if name.endswith("-oracle"))
SCALED = {
    "complex": ("base-one-shot", "merged-best-of", "distilled-loop", "merged-loop"),
    "dense": ("merged-dense",),
}
"""Split -> rows whose accuracy is shown by the number of images."""
CORRECTED = ("merged-loop", "distilled-loop", "merged-blind", "distilled-blind")
"""Rows whose corrections are counted."""


def sections(aligned: str) -> tuple[Section, ...]:
    """Tables of systems; `aligned` is the name of the row of the model that is merged."""
    return (
        Section(
            "The method, part by part",
            "One shot of the base model, the loop with a generator that knows histories, the loop in few steps, and "
            "that loop with blank canvases in place of images (blind).",
            ("base-one-shot", "base-loop", "sft-loop", "pprl-loop", "merged-loop", "merged-blind"),
            "base-one-shot",
            "method.png",
        ),
        Section(
            "What verification adds",
            "The same models with blank canvases in place of images (blind), without verification, with the controller "
            "as the verifier, in its conversation, and, as an upper bound, with the detector's descriptions of images "
            "in place of the verifier's.",
            (
                "merged-blind",
                "merged-unverified",
                "merged-controller",
                "merged-loop",
                "merged-exact",
                "distilled-blind",
                "distilled-loop",
            ),
            "merged-blind",
        ),
        Section(
            "What merging adds",
            "Either delta alone, both, and other ways to merge the same two models. The oracle plans and verifies, so "
            "the mistakes are those of the generator.",
            MERGING,
            "merged-oracle",
            "merging.png",
        ),
        Section(
            "Open loop",
            "The controller plans the whole image, and the plan is generated once, without verification.",
            ("base-one-shot", "base-open-loop", "aligned-open-loop", "merged-open-loop", aligned, "merged-loop"),
            "base-one-shot",
        ),
    )


def main(
    out: Path = Path("runs/paper"),
    page: Path = Path("docs/results.md"),
    base: str = "shapes-tiny-base",
    distilled: str | None = None,
    sft: str = "shapes-tiny-sft",
    pprl: str | None = None,
    aligned: Literal["sft", "pprl"] | None = None,
    controller: str = "shapes-tiny",
    limit: int | None = None,
    timed: int = 60,
    seeds: tuple[int, ...] = (0, 1),
) -> None:
    """Merges the models, generates and scores images, measures times and deltas, and writes the page.

    Args:
      out: Write models and images to this directory.
      page: Write the tables to this Markdown file, and its plots to a directory of the same name beside it.
      base: Base model, a shipped name or a pipeline directory; the four models differ in their transformer only.
      distilled: Distilled model, a shipped name or a pipeline directory; recovered from the shipped models, by
        subtraction of their deltas, if it is not given.
      sft: Fine-tuned model, a shipped name or a pipeline directory.
      pprl: Model trained by PPRL, a shipped name or a pipeline directory; its rows are left out if it is not given.
      aligned: Merge this model with the distilled one; the model trained by PPRL if there is one, else the fine-tuned.
      controller: Controller, a shipped name or a directory with a controller/.
      limit: Use at most this many prompts of each split; all of them if it is not given.
      timed: Measure the time of the loop on this many complex prompts.
      seeds: Generate one image of each prompt for each of these seeds.
    """
    at_least_one("--limit", limit)
    at_least_one("--timed", timed)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: give different seeds, one at least")
    for seed in seeds:
        check_seed(seed)
    if not can_plot():
        raise ClvrError("the page has plots, and matplotlib is not installed: pip install 'clvr-jax[plots]'")
    check_directory(out)
    check_file(page)
    enable_compilation_cache()
    stages = Stages(out)
    sources = Sources(base, distilled, sft, pprl, controller, aligned)
    looped = f"{sources.merged}-loop"
    directories = model_directories(sources, stages)
    rows = {name: row for name, row in ROWS.items() if row.model in directories}
    prompts = [Prompts(split, limit, seeds) for split in dict.fromkeys((*SPLITS, *SCALED))]
    found = {
        name: {p.split: results(name, row, directories[row.model], p, stages) for p in prompts if p.split in row.splits}
        for name, row in rows.items()
    }
    some = Prompts("complex", min(timed, limit or timed)).metadata
    scaled = {
        split: [name for name in dict.fromkeys((*names, looped)) if name in rows and split in rows[name].splits]
        for split, names in SCALED.items()
    }
    measured = Measured(
        command=" ".join(("python -m clvr_jax.scripts.paper", *sys.argv[1:])),
        rows=rows,
        found=found,
        metadata={each.split: each.metadata for each in prompts if each.split in SPLITS},
        aligned=looped,
        merged="merged-loop",
        times={name: _times(name, directories[rows[name].model], some, stages) for name in (looped, "merged-loop")},
        interactions=_changes([directories[name] for name in ("base", "distilled", "aligned")], some, stages),
        norms=read_json(directories["merged"] / REPORT)["whole"],
        scaling={
            split: from_trajectories(
                {rows[name].label: RunDirectory(found[name][split].directories[0]) for name in names}
            )
            for split, names in scaled.items()
            if names
        },
        corrections={name: _corrections(found[name]["complex"]) for name in CORRECTED if name in rows},
        seconds=stages.seconds,
    )
    tiers = ("base-one-shot", "aligned-open-loop", looped, "merged-loop", "aligned-oracle", "merged-oracle")
    write_page(page, measured, sections(looped), tiers)


def _corrections(results: SystemResults) -> Corrections:
    directory, run = RunDirectory(results.directories[0]), results.runs[0]
    return count_corrections(directory, run["pictures"], shapes_checker())


def _times(name: str, model: Path, metadata: Sequence[Metadata], stages: Stages) -> dict[int, GroupTime]:
    prompts = [entry["prompt"] for entry in metadata]

    def measure(directory: Path) -> None:
        write_json(directory / "times.json", {"prompts": loop_times(model, prompts)})

    directory = stages.directory(
        f"times-{name}", {"model": digest(model), "prompts": prompts, "of": "images, generation, diffusion"}, measure
    )
    return times_by_image_count(read_json(directory / "times.json")["prompts"])


def _changes(models: Sequence[Path], metadata: Sequence[Metadata], stages: Stages) -> Interactions:
    base, distilled, aligned = models

    def measure(directory: Path) -> None:
        write_json(directory / "changes.json", interactions(base, distilled, aligned, metadata))

    prompts = [entry["prompt"] for entry in metadata]
    inputs = {"models": [digest(model) for model in models], "prompts": prompts}
    return cast(Interactions, read_json(stages.directory("changes", inputs, measure) / "changes.json"))


if __name__ == "__main__":
    run_script(main)
