"""Benchmarks in their official layouts, scores with confidence intervals, and paired comparisons of systems."""

from clvr_jax.evaluation.benchmarks.shapes import Judge, Judgment, run, score, shapes_judge
from clvr_jax.evaluation.comparison.pairs import compare, load_results
from clvr_jax.evaluation.reporting.run import ImageScore, markdown, rich_table, summarize

__all__ = [
    "ImageScore",
    "Judge",
    "Judgment",
    "compare",
    "load_results",
    "markdown",
    "rich_table",
    "run",
    "score",
    "shapes_judge",
    "summarize",
]
