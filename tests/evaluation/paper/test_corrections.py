"""Corrections are counted from the images of trajectories."""

from clvr_jax.evaluation.benchmarks.shapes import ImageChecker
from clvr_jax.evaluation.harness.benchmark import Score
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.evaluation.paper.corrections import Corrections, count_corrections
from clvr_jax.reasoning import IMAGE_GEN, Step, Trajectory
from clvr_jax.reasoning.trajectories.trajectory import ACCEPTED, STEP_LIMIT
from clvr_jax.worlds.shapes.prompts import evaluation_prompts
from tests.evaluation.runs import run_function
from tests.reasoning.scripted import picture, value_of


def test_runs_are_counted_by_the_image_of_their_last_planned_step_and_by_their_end(tmp_path):
    """Images of odd values are right. Prompts have four objects, so the plan ends with the second image."""
    metadata = [entry for entry in evaluation_prompts("complex") if entry["tier"] == 4][:5]
    runs = [
        ((2, 3), ACCEPTED),  # right after the plan
        ((2, 4, 5), ACCEPTED),  # recovered
        ((2, 4, 6), ACCEPTED),  # accepted, and wrong
        ((2, 4, 7), STEP_LIMIT),  # recovered, and not accepted
        ((2,), STEP_LIMIT),  # ended before its plan did
    ]
    trajectories = [
        Trajectory(entry["prompt"], tuple(Step("r", IMAGE_GEN, image=picture(value)) for value in values), outcome)
        for entry, (values, outcome) in zip(metadata, runs, strict=True)
    ]
    checker = ImageChecker("odd", "1", lambda image, metadata: Score.binary(value_of(image) % 2 == 1))
    run_function(metadata, lambda prompts, seeds: trajectories, tmp_path, checker, settings={})
    entries = [
        {"index": number, "sample": 0, "correct": bool(values[-1] % 2)} for number, (values, _) in enumerate(runs)
    ]
    found = count_corrections(RunDirectory(tmp_path), entries, checker)
    assert found == Corrections(runs=5, wrong=4, recovered=2, accepted=3, wrongly_accepted=1, unaccepted_right=1)
