"""`clvr eval shapes`."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from rich.console import Group

from clvr_jax.arguments import at_least_one, check_guidance
from clvr_jax.commands.common import Common, Count, Flags, Folder, Guidance, Result, prepare_jax
from clvr_jax.console import progress


@dataclass(frozen=True)
class EvalShapes:
    """Draws the prompts of the shapes world, whose pictures a program checks. A run that was stopped goes on."""

    EXAMPLE: ClassVar = "clvr eval shapes --split complex --limit 60 --model shapes-tiny --out out/complex"

    model: str
    """Shipped model, a folder in diffusers layout or a Hugging Face id."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the pictures in GenEval's layout and results.json."""
    split: Literal["eval", "complex"] = "eval"
    """eval: 553 prompts with GenEval's tags. complex: 300 prompts with 3 to 6 objects."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Prompts of your own in GenEval's metadata format, instead of a split."""
    mode: Literal["one-shot", "closed-loop"] = "one-shot"
    """one-shot: each prompt is drawn once. closed-loop: plan, draw, look, correct."""
    controller: Literal["vlm", "oracle"] = "vlm"
    """Of the closed loop: the model's own, or the oracle that reads pictures exactly."""
    max_steps: Count = None
    """Drawings of the closed loop at most; 8 if not given."""
    limit: Count = None
    """Use at most so many prompts, spread over the set."""
    steps: Count = None
    """Sampler steps in one shot; the model's own number if not given."""
    guidance: Guidance = None
    """Guidance in one shot; the model's own if not given."""
    against: Folder = None
    """Folder of another run on the same prompts, for a paired comparison with this one."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--max-steps", self.max_steps)
        at_least_one("--limit", self.limit)
        at_least_one("--steps", self.steps)
        check_guidance(self.guidance)

    def run(self) -> Result:
        """Draws, scores, and writes results.json."""
        prepare_jax()
        from clvr_jax.evaluation.compare import compare, comparison_table, load_results
        from clvr_jax.evaluation.report import rich_table
        from clvr_jax.evaluation.systems import evaluate_shapes

        other = load_results(self.against) if self.against else None  # before minutes are spent
        title = f"shapes {self.prompts or self.split}, {self.model}, {self.mode}"
        with contextlib.ExitStack() as stack:
            advance: Callable[[int], None] | None = None

            def on_progress(done: int, total: int) -> None:
                nonlocal advance
                if advance is None:
                    advance = stack.enter_context(progress(title, total, done))
                advance(done)

            results = evaluate_shapes(
                self.model,
                self.out,
                split=self.split,
                prompts=self.prompts,
                mode=self.mode,
                controller=self.controller,
                max_steps=self.max_steps,
                limit=self.limit,
                steps=self.steps,
                guidance=self.guidance,
                on_progress=on_progress,
            )
        data = {key: value for key, value in results.items() if key != "pictures"}
        table = rich_table(results["summary"], title)
        if other is None:
            return Result({**data, "out": str(self.out)}, table)
        comparison = compare(other, results)
        both = Group(table, comparison_table(comparison, str(self.against), str(self.out)))
        return Result({**data, "out": str(self.out), "comparison": comparison}, both)
