"""Benchmarks in their official layouts, scores with confidence intervals, and paired comparisons of systems."""

from clvr_jax.evaluation.benchmarks.shapes import ImageChecker, Shapes, shapes_checker, shapes_prompts
from clvr_jax.evaluation.comparison.pairs import compare, load_results
from clvr_jax.evaluation.harness.benchmark import Benchmark, Item, Score
from clvr_jax.evaluation.harness.images import load_generated
from clvr_jax.evaluation.harness.run import run
from clvr_jax.evaluation.harness.scoring import Scorer, score_images
from clvr_jax.evaluation.reporting.run import results_table
from clvr_jax.evaluation.systems.system import System

__all__ = [
    "Benchmark",
    "ImageChecker",
    "Item",
    "Score",
    "Scorer",
    "Shapes",
    "System",
    "compare",
    "load_generated",
    "load_results",
    "results_table",
    "run",
    "score_images",
    "shapes_checker",
    "shapes_prompts",
]
