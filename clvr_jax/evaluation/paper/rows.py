"""The systems of the comparison, as data, and their results on the prompts of the shapes world."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from clvr_jax.compilation import release_programs
from clvr_jax.display.console import progress
from clvr_jax.evaluation.benchmarks.shapes import SHAPES_JUDGE_VERSION, run_shapes, shapes_prompts
from clvr_jax.evaluation.comparison.pairs import load_results
from clvr_jax.evaluation.comparison.systems import SystemResults
from clvr_jax.evaluation.harness.results import ImageResult, PooledResults
from clvr_jax.evaluation.paper.stages import Stages, digest
from clvr_jax.evaluation.systems.models import Mode, Oracle, one_shot, planned
from clvr_jax.evaluation.systems.system import System
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.verification.verification import VerificationMode
from clvr_jax.worlds.shapes.metadata import Metadata

SPLITS = ("eval", "complex")


@dataclass(frozen=True)
class Row:
    """A model in one mode, which is a row of the tables.

    Attributes:
      label: the name in tables.
      model: its key in `model_directories`.
      mode: one-shot, open-loop, best-of or closed-loop.
      controller: the controller, not used for one-shot.
      budget: limits per prompt.
      verification: which component accepts an image, as in `reasoning.loop.run`; if None, the oracle accepts its own
        images, and other systems have a separate verifier.
      is_blind: whether controller and verifier see a blank canvas in place of every image, as an ablation.
      has_exact_descriptions: whether the detector describes images for the verifier, as an ablation.
      splits: evaluation sets.
    """

    label: str
    model: str
    mode: Mode = "closed-loop"
    controller: Literal["vlm", "oracle"] = "vlm"
    budget: Budget = Budget()
    verification: VerificationMode | None = None
    is_blind: bool = False
    has_exact_descriptions: bool = False
    splits: tuple[str, ...] = SPLITS

    def system(self, model: Path, metadata: list[Metadata]) -> System:
        """Loads the models and returns the system."""
        if self.mode == "one-shot":
            return one_shot(str(model))
        oracle = Oracle(metadata) if self.controller == "oracle" else None
        return planned(
            str(model),
            self.mode,
            self.budget,
            oracle,
            self.controller,
            verification=self.verification,
            is_blind=self.is_blind,
            has_exact_descriptions=self.has_exact_descriptions,
        )


@dataclass(frozen=True)
class Prompts:
    """A set of prompts and seeds.

    Attributes:
      split: name of the evaluation set.
      limit: maximum number of prompts; None for all.
      seeds: one image of each prompt is generated with each seed.
    """

    split: str
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)

    @property
    def metadata(self) -> list[Metadata]:
        """The metadata of the prompts, in order."""
        return shapes_prompts(self.split, None, self.limit)


def results(name: str, row: Row, model: Path, prompts: Prompts, stages: Stages) -> SystemResults:
    """Returns the results of a row with all seeds, and generates images that do not exist yet.

    Args:
      name: of the row, which begins the names of its directories.
      row: the system.
      model: directory of its model.
      prompts: prompts and seeds.
      stages: stores the results.
    """
    # Another controller changes nothing where none is used.
    without_controller = row.mode == "one-shot" or row.controller == "oracle"
    inputs = {
        "model": digest(model, ("controller",) if without_controller else ()),
        "mode": row.mode,
        "controller": row.controller,
        "budget": asdict(row.budget),
        "verification": row.verification,
        "blind": row.is_blind,
        **({"descriptions": "detector"} if row.has_exact_descriptions else {}),
        "judge": SHAPES_JUDGE_VERSION,
        "split": prompts.split,
        "limit": prompts.limit,
    }
    directories = []
    for seed in prompts.seeds:
        generate = partial(_generate, row=row, model=model, prompts=prompts, seed=seed)
        directories.append(stages.directory(f"{name}-{prompts.split}-{seed}", {**inputs, "seed": seed}, generate))
    return SystemResults(row.label, tuple(directories), tuple(map(load_results, directories)))


def _generate(directory: Path, row: Row, model: Path, prompts: Prompts, seed: int) -> None:
    metadata = prompts.metadata
    system = row.system(model, metadata)
    with progress(f"{row.label}, {prompts.split}, seed {seed}", len(metadata)) as advance:
        run_shapes(
            system,
            metadata,
            directory,
            prompts=prompts.split,
            limit=prompts.limit,
            seed=seed,
            on_progress=lambda done, total: advance(done),
        )
    release_programs()  # each row compiles those of its own pipeline


def concatenate_splits(parts: Mapping[str, SystemResults]) -> PooledResults:
    """Concatenates the results on several splits for comparisons; prompt indices continue from split to split."""
    images: list[ImageResult] = []
    for part in parts.values():
        first = 1 + max((entry["index"] for entry in images), default=-1)
        images += [{**entry, "index": first + entry["index"]} for entry in part.pooled["pictures"]]
    return {**next(iter(parts.values())).pooled, "pictures": images}
