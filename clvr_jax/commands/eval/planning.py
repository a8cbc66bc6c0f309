"""`clvr eval planning`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from clvr_jax.arguments import at_least_one, check_seed
from clvr_jax.commands.common import Common, Count, Directory, Flags, Result, prepare_jax, results_directory
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    from clvr_jax.evaluation.planning import PlanningResults
    from clvr_jax.worlds.shapes.metadata import Metadata


@dataclass(frozen=True)
class EvalPlanning:
    """Measures planning alone: whether requirements and plans meet the prompts, before any image is generated.

    The control scores each plan against another prompt with as many objects.
    """

    EXAMPLE: ClassVar = "clvr eval planning --model shapes-tiny --split complex --out out/planning"

    out: Directory = None
    """Write results.json and planning.md to this directory. If not given, the table is only printed."""
    model: str = "shapes-tiny"
    """Plan and verify with this model: a shipped name, a directory with controller/, or a directory or Hugging Face id
    of a Qwen3-VL."""
    split: Literal["own", "eval", "complex", "dense", "second"] = "complex"
    """Set of prompts. own: prompts of this benchmark, which are in no evaluation set, so that a model may be chosen by
    them. The others are the evaluation sets of `clvr eval shapes`."""
    limit: Count = None
    """Use at most this many prompts, spread evenly over the set; all of them, or 96 of own ones, if not given."""
    retries: int = 16
    """Sample a plan that misses a requirement again at most this many times, as the loop does."""
    seed: int = 0
    """The same seed gives the same plans."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--limit", self.limit)
        check_seed(self.seed)
        if self.retries < 0:
            raise UsageError(f"--retries must be 0 or more, got {self.retries}")

    def run(self) -> Result:
        """Plans all prompts, and writes the results if there is a directory for them."""
        prepare_jax()
        from clvr_jax.evaluation import planning
        from clvr_jax.files.atomic_io import write_json, write_text

        with results_directory(self.out, planning.BENCHMARK):
            found = self._planned()
            if self.out is not None:
                write_text(self.out / "planning.md", planning.markdown(found))
                write_json(self.out / "results.json", found)
        data = {key: value for key, value in found.items() if key != "plans"}
        table = planning.planning_table(found).rich()
        return Result(data if self.out is None else {**data, "out": str(self.out)}, table)

    def _planned(self) -> "PlanningResults":
        """Plans all prompts; returns the content of results.json."""
        from clvr_jax.evaluation import planning
        from clvr_jax.pipelines.closed_loop import VLMController
        from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline, Verifier
        from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory
        from clvr_jax.reasoning.conversation.actions import SYSTEM_PROMPT

        directory, is_trained = controller_directory(self.model)
        vlm = Qwen3VLPipeline.from_pretrained(directory)
        prompts = self._prompts()
        planned = planning.plan_prompts(
            VLMController(vlm, None if is_trained else SYSTEM_PROMPT),
            Verifier.of_pipeline(vlm, self.model, is_trained),
            prompts,
            retries=self.retries,
            seed=self.seed,
        )
        return planning.results(
            planned, prompts, model=self.model, prompts=self.split, seed=self.seed, retries=self.retries
        )

    def _prompts(self) -> "list[Metadata]":
        from clvr_jax.evaluation.statistics import spread
        from clvr_jax.evaluation.verifier.cases import sample_prompts
        from clvr_jax.worlds.shapes.prompts import evaluation_prompts

        if self.split == "own":
            return [each.metadata for each in sample_prompts(self.limit or 96, self.seed)]
        return spread(evaluation_prompts(self.split), self.limit)
