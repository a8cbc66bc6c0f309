"""Benchmarks in their official layouts, scores with confidence intervals, and paired comparisons of systems."""

from clvr_jax.evaluation.compare import compare, load_results
from clvr_jax.evaluation.report import ImageScore, markdown, rich_table, summarize
from clvr_jax.evaluation.shapes import Judge, Judgment, run, score, shapes_judge

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
