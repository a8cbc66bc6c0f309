"""Runs of benchmarks with a function in place of a model, and their scores by a judge."""

from dataclasses import replace

from clvr_jax.evaluation import Shapes, System, run, score_images
from clvr_jax.evaluation.judging.scorer import JudgeScorer


def run_function(
    metadata, generate, out, scorer, *, settings=None, device=None, batch_size=16, benchmark=None, **options
):
    """Runs the benchmark on metadata in GenEval's format; generate: (prompts, seeds) -> results."""
    benchmark = benchmark or Shapes()
    items = [benchmark.item(entry, index) for index, entry in enumerate(metadata)]
    return run(benchmark, items, System(generate, settings or {}, device, batch_size), out, scorer, **options)


def score_judged(benchmark, images, judge):
    """Scores the images of a run with a judge, by the rules of a benchmark, which may be other rules than the run's."""
    images = images if images.benchmark == benchmark else replace(images, benchmark=benchmark)
    return score_images(images, JudgeScorer(judge))
