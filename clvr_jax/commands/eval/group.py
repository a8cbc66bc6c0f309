"""`clvr eval ...`: the table of its commands."""

from dataclasses import dataclass
from typing import Any, ClassVar

from clvr_jax.commands.common import CommandGroup
from clvr_jax.commands.eval.benchmarks import PUBLISHED_BENCHMARKS
from clvr_jax.commands.eval.compare import EvalCompare
from clvr_jax.commands.eval.planning import EvalPlanning
from clvr_jax.commands.eval.scaling import EvalScaling
from clvr_jax.commands.eval.shapes import EvalShapes
from clvr_jax.commands.eval.verifier import EvalVerifier


@dataclass(frozen=True)
class Eval(CommandGroup):
    """Generates and scores the images of a benchmark, or compares systems that were scored."""

    EXAMPLE: ClassVar = EvalShapes.EXAMPLE
    COMMANDS: ClassVar[dict[str, type[Any]]] = {
        "shapes": EvalShapes,
        **PUBLISHED_BENCHMARKS,
        "compare": EvalCompare,
        "scaling": EvalScaling,
        "verifier": EvalVerifier,
        "planning": EvalPlanning,
    }
