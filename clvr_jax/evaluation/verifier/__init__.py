"""The verifier benchmark: does a verifier accept right images, and no others?"""

from clvr_jax.evaluation.verifier.cases import Case, ShapesPrompt, control_cases, rendered_cases, sample_prompts
from clvr_jax.evaluation.verifier.metrics import CheckedCase, calibration_error, roc_auc, summarize
from clvr_jax.evaluation.verifier.run import check_cases, evaluate

__all__ = [
    "Case",
    "CheckedCase",
    "ShapesPrompt",
    "calibration_error",
    "check_cases",
    "control_cases",
    "evaluate",
    "rendered_cases",
    "roc_auc",
    "sample_prompts",
    "summarize",
]
