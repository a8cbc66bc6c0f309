"""Curves that are read off a trajectory say what runs under smaller budgets give."""

import re

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation import ImageChecker, Score, shapes_checker
from clvr_jax.evaluation.benchmarks.geneval import GenEval
from clvr_jax.evaluation.comparison.scaling import BudgetCurve, budget_curve, curves, from_trajectories, gain
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.evaluation.reporting.scaling import scaling_markdown, write_scaling
from clvr_jax.evaluation.systems.models import Oracle, budget_for_mode
from clvr_jax.evaluation.systems.open_loop import OpenLoopController
from clvr_jax.files.atomic_io import read_json
from clvr_jax.reasoning import Budget
from clvr_jax.reasoning import run as run_loop
from clvr_jax.worlds.shapes.prompts import evaluation_prompts
from tests.evaluation.runs import run_function
from tests.evaluation.test_closed_loop_in_shapes import ClumsyDrawer
from tests.reasoning.scripted import NoisyController, NoisyDrawer, value_of

METADATA = evaluation_prompts("complex")[::30]


@pytest.mark.parametrize("candidates", [1, 3])
def test_what_is_read_off_is_what_a_smaller_budget_gives(candidates):
    odd = ImageChecker("odd", "1", lambda image, metadata: Score.binary(value_of(image) % 2 == 1))
    prompts = [f"prompt {number}" for number in range(25)]

    def go(**limits):
        budget = Budget(candidates=candidates, **limits)
        return run_loop(prompts, NoisyController(), NoisyDrawer(), budget, range(25))

    whole = [budget_curve(number, each, {}, odd) for number, each in enumerate(go(max_steps=9))]
    assert max(len(curve.correct) for curve in whole) == 9
    for steps in (1, 2, 4, 7):
        for curve, smaller in zip(whole, go(max_steps=steps), strict=True):
            expected = smaller.image is not None and value_of(smaller.image) % 2 == 1
            assert curve.correct_after(steps) == expected
            if smaller.generated:
                assert curve.nfe[min(steps, len(curve.nfe)) - 1] == smaller.nfe


def test_points_of_a_curve_by_hand():
    all_curves = [
        BudgetCurve(0, (4, 8), (1.0, 3.0), (False, True), (False, True)),
        BudgetCurve(1, (4,), (2.0,), (True,), (True,)),
        BudgetCurve(2, (), (), (), ()),  # no picture at all
    ]
    found = curves(all_curves)
    assert [(point["limit"], point["accuracy"]) for point in found["images"]] == [(1, 1 / 3), (2, 2 / 3)]
    assert [point["nfe"] for point in found["images"]] == [8 / 3, 4.0]
    assert [(point["limit"], point["accuracy"]) for point in found["nfe"]] == [(4, 1 / 3), (8, 2 / 3)]
    seconds = found["seconds"]
    assert (seconds[0]["limit"], seconds[0]["accuracy"]) == (pytest.approx(1.0), 0.0)
    assert (seconds[-1]["limit"], seconds[-1]["accuracy"]) == (pytest.approx(3.0), 2 / 3)
    at_two = next(point for point in seconds if point["limit"] >= 2)
    assert at_two["accuracy"] == 1 / 3
    assert at_two["low"] < 1 / 3 < at_two["high"]
    with pytest.raises(ClvrError, match="no image was generated"):
        curves(all_curves[2:])


def test_the_gain_of_a_larger_budget_is_paired_by_prompt():
    won, lost, same = (False, False, False, True), (True, True, True, False), (True,)
    all_curves = [
        BudgetCurve(index, (4,) * len(correct), (1.0,) * len(correct), correct, correct)
        for index, correct in enumerate([won] * 6 + [lost] + [same] * 3)
    ]
    found = gain(all_curves, 3, 4)
    assert (found["won"], found["lost"]) == (6, 1)
    assert found["difference"] == pytest.approx(0.5)
    assert found["interval"][0] < 0.5 < found["interval"][1]
    assert found["p_value"] == pytest.approx(2 * (1 + 7) / 2**7)


def black(prompts, seeds):
    return [np.zeros((64, 64, 3), np.uint8)] * len(prompts)


def finished(out, mode, **limits):
    oracle = Oracle(METADATA)
    controller = oracle if mode == "closed-loop" else OpenLoopController(oracle)
    budget = budget_for_mode(mode, Budget(**limits))
    run_function(
        METADATA,
        lambda prompts, seeds: run_loop(prompts, controller, ClumsyDrawer(), budget, seeds),
        out,
        shapes_checker(),
        settings={"mode": mode},
    )
    return RunDirectory(out)


@pytest.mark.slow
def test_finished_runs_become_a_report(tmp_path):
    folders = {
        "loop": finished(tmp_path / "loop", "closed-loop", max_steps=10),
        "best of 4": finished(tmp_path / "best", "best-of", candidates=4),
    }
    scaling = from_trajectories(folders)
    loop, best = (system["curves"]["images"] for system in scaling["systems"])
    assert [point["limit"] for point in best] == [1, 2, 3, 4]
    assert loop[-1]["accuracy"] == read_json(tmp_path / "loop" / "results.json")["summary"]["overall"]["mean_of_tags"]
    assert best[-1]["accuracy"] >= best[0]["accuracy"]
    assert loop[-1]["accuracy"] > loop[1]["accuracy"]
    assert np.all(np.diff([point["nfe"] for point in loop]) >= 0)
    perfect = [point["accuracy"] for point in scaling["systems"][1]["perfect_choice"]]
    assert perfect == [point["accuracy"] for point in best]  # the oracle chooses perfectly

    assert write_scaling(scaling, tmp_path / "report") == ["scaling.json", "scaling.md", "scaling.png"]
    assert read_json(tmp_path / "report" / "scaling.json") == scaling
    assert (tmp_path / "report" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    text = scaling_markdown(scaling)
    assert len(re.findall(r"^\| loop \| ", text, re.MULTILINE)) == 3 * 8
    assert f"| best of 4 | 4 | {best[-1]['accuracy']:.3f} |" in text


def test_runs_that_do_not_belong_together_are_refused(tmp_path):
    folder = finished(tmp_path / "loop", "open-loop")
    with pytest.raises(ClvrError, match="no such file"):
        from_trajectories({"x": RunDirectory(tmp_path / "none")})
    other = tmp_path / "other"
    run_function(METADATA[:2], black, other, shapes_checker(), settings={})
    with pytest.raises(ClvrError, match="other prompts than a; give runs on the same"):
        from_trajectories({"a": folder, "b": RunDirectory(other)})
    (tmp_path / "loop" / "00001" / "samples" / "0000.png").unlink()
    with pytest.raises(ClvrError, match="1 of 10 images are missing"):
        from_trajectories({"a": folder})
    run_function(METADATA[:1], black, tmp_path / "named", shapes_checker(), settings={}, benchmark=GenEval())
    with pytest.raises(ClvrError, match="a run of geneval"):
        from_trajectories({"a": RunDirectory(tmp_path / "named")})


def test_a_drawing_in_one_go_is_a_curve_of_one_point(tmp_path):
    run_function(
        METADATA[:3],
        black,
        tmp_path,
        shapes_checker(),
        settings={},
    )
    (system,) = from_trajectories({"once": RunDirectory(tmp_path)})["systems"]
    assert [point["accuracy"] for point in system["curves"]["images"]] == [0.0]
    assert system["curves"]["nfe"] == []  # not recorded
