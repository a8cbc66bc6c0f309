"""The systems that are compared, as data, and their results on the prompts of the shapes world."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from clvr_jax.console import progress
from clvr_jax.evaluation.compare import load_results
from clvr_jax.evaluation.contest import Contestant
from clvr_jax.evaluation.paper.stages import Stages, digest
from clvr_jax.evaluation.shapes import SHAPES_JUDGE_VERSION, run, shapes_judge, shapes_prompts
from clvr_jax.evaluation.systems import Mode, Oracle, System, one_shot, planned
from clvr_jax.reasoning.budget import Budget
from clvr_jax.reasoning.verification import VerificationMode

SPLITS = ("eval", "complex")


@dataclass(frozen=True)
class Row:
    """A model in one of its modes.

    label: in tables. model: its name among the directories. controller: who plans, unless it is one shot. verification:
    who accepts an image in the loop, see `reasoning.loop.run`; the oracle accepts its own images if None. is_blind: the
    ablation that shows blank canvases to controller and verifier. splits: evaluation sets.
    """

    label: str
    model: str
    mode: Mode = "closed-loop"
    controller: Literal["vlm", "oracle"] = "vlm"
    budget: Budget = Budget()
    verification: VerificationMode | None = None
    is_blind: bool = False
    splits: tuple[str, ...] = SPLITS

    def system(self, model: Path, metadata: list[dict[str, Any]]) -> System:
        """The system, its models loaded."""
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
        )


@dataclass(frozen=True)
class Prompts:
    """split: which. limit: at most so many, None for all. seeds: one picture of each prompt for every seed."""

    split: str
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)

    @property
    def metadata(self) -> list[dict[str, Any]]:
        """Of all of them, in order."""
        return shapes_prompts(self.split, None, self.limit)


def results(name: str, row: Row, model: Path, prompts: Prompts, stages: Stages) -> Contestant:
    """The results of a row with all seeds; what is not there is drawn.

    Args:
      name: of the row, for its folders.
      row: what draws. model: its folder.
      prompts: what is drawn.
      stages: where results are kept.
    """
    inputs = {
        "model": digest(model),
        "mode": row.mode,
        "controller": row.controller,
        "budget": asdict(row.budget),
        "verification": row.verification,
        "blind": row.is_blind,
        "judge": SHAPES_JUDGE_VERSION,
        "split": prompts.split,
        "limit": prompts.limit,
    }
    folders = []
    for seed in prompts.seeds:
        draw = partial(_draw, row=row, model=model, prompts=prompts, seed=seed)
        folders.append(stages.folder(f"{name}-{prompts.split}-{seed}", {**inputs, "seed": seed}, draw))
    return Contestant(row.label, tuple(folders), tuple(map(load_results, folders)))


def _draw(folder: Path, row: Row, model: Path, prompts: Prompts, seed: int) -> None:
    metadata = prompts.metadata
    system = row.system(model, metadata)
    with progress(f"{row.label}, {prompts.split}, seed {seed}", len(metadata)) as advance:
        run(
            metadata,
            system.draw_all,
            folder,
            shapes_judge(),
            settings={**system.settings, "prompts": prompts.split, "limit": prompts.limit},
            seed=seed,
            batch_size=system.batch_size,
            device=system.device,
            on_progress=lambda done, total: advance(done),
        )


def joined(parts: Mapping[str, Contestant]) -> dict[str, Any]:
    """Results on several splits as one, for comparisons: the prompts of each follow those of the one before."""
    pictures: list[dict[str, Any]] = []
    for part in parts.values():
        first = 1 + max((entry["index"] for entry in pictures), default=-1)
        pictures += [{**entry, "index": first + entry["index"]} for entry in part.pooled["pictures"]]
    return {**next(iter(parts.values())).pooled, "pictures": pictures}
