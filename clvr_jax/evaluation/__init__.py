"""Benchmarks that write the official layouts, scores with intervals, and paired comparisons."""

from clvr_jax.evaluation.compare import compare, load_results
from clvr_jax.evaluation.report import PictureScore, markdown, rich_table, summarize
from clvr_jax.evaluation.shapes import Judge, Judgment, run, score, shapes_judge

__all__ = [
    "Judge",
    "Judgment",
    "PictureScore",
    "compare",
    "load_results",
    "markdown",
    "rich_table",
    "run",
    "score",
    "shapes_judge",
    "summarize",
]
