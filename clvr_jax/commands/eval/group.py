"""`clvr eval ...`: the table of its commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from clvr_jax.commands.common import Command, CommandGroup
from clvr_jax.commands.eval.benchmarks import PUBLISHED_BENCHMARKS
from clvr_jax.commands.eval.compare import EvalCompare
from clvr_jax.commands.eval.planning import EvalPlanning
from clvr_jax.commands.eval.scaling import EvalScaling
from clvr_jax.commands.eval.shapes import EvalShapes
from clvr_jax.commands.eval.steps import EvalSteps
from clvr_jax.commands.eval.verifier import EvalVerifier


@dataclass(frozen=True)
class Eval(CommandGroup):
    """Generates and scores the images of a benchmark, or compares systems that were scored."""

    EXAMPLE: ClassVar = EvalShapes.EXAMPLE
    COMMANDS: ClassVar[Mapping[str, type[Command]]] = {
        "shapes": EvalShapes,
        **PUBLISHED_BENCHMARKS,
        "compare": EvalCompare,
        "scaling": EvalScaling,
        "verifier": EvalVerifier,
        "planning": EvalPlanning,
        "steps": EvalSteps,
    }
