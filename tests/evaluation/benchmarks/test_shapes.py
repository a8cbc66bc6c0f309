import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation import ImageChecker, Score, Shapes, load_generated, score_images, shapes_checker
from clvr_jax.evaluation.benchmarks.geneval import GenEval
from clvr_jax.evaluation.harness.run_directory import RunDirectory
from clvr_jax.interfaces import ImageResponse, Usage
from clvr_jax.reasoning import Budget, GeneratedImage, Trajectory
from clvr_jax.reasoning import run as run_loop
from clvr_jax.worlds.shapes.prompts import evaluation_prompts
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import Scene, SceneObject, cell_center
from tests.evaluation.runs import run_function
from tests.reasoning.scripted import CountingDrawer, ScriptedController, again, generate, stop

METADATA = [
    {
        "tag": "colors" if n % 2 else "counting",
        "tier": n // 2,
        "include": [{"class": "dot", "count": n}],
        "prompt": f"p {n}",
    }
    for n in range(5)
]
SETTINGS = {"model": "toy", "steps": 4, "budget": {"max_steps": 8}}


def bright(image, metadata):
    """Correct if the picture is brighter than 100."""
    correct = bool(image.mean() > 100)
    return Score.binary(correct, () if correct else ("too dark",))


JUDGE = ImageChecker("brightness", "1", bright)


class Draw:
    """A picture whose color is its seed's; remembers what it was asked for."""

    def __init__(self, fail_after=None):
        self.asked = []
        self.fail_after = fail_after

    def __call__(self, prompts, seeds):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += list(zip(prompts, seeds, strict=True))
        return [GeneratedImage(np.full((4, 4, 3), seed % 256, np.uint8), 4) for seed in seeds]


def go(out, draw_all=None, judge=JUDGE, **changes):
    return run_function(METADATA, draw_all or Draw(), out, judge, **{"settings": SETTINGS, "batch_size": 2, **changes})


def score(out, judge):
    return score_images(load_generated(Shapes(), out), judge)


def test_layout_is_genevals(tmp_path):
    go(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == [f"{n:05d}" for n in range(5)]
    for index, entry in enumerate(METADATA):
        folder = tmp_path / f"{index:05d}"
        # GenEval's scorer reads the file with json.load and takes every name that begins with digits for a picture.
        assert json.loads((folder / "metadata.jsonl").read_text()) == entry
        assert [name for name in os.listdir(folder / "samples") if re.match(r"\d+\.png", name)] == ["0000.png"]
        assert Image.open(folder / "samples" / "0000.png").size == (4, 4)
    assert not list(tmp_path.rglob("*.tmp"))


def test_records_keep_the_keys_of_earlier_versions(tmp_path):
    go(tmp_path)
    record = json.loads((tmp_path / "00000" / "records" / "0000.json").read_text())
    assert list(record)[:3] == ["prompt", "seed", "has_picture"]
    assert record["has_picture"] is True
    assert RunDirectory(tmp_path).record(0, 0).has_image


def test_results_are_complete(tmp_path):
    results = go(tmp_path, seed=3)
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["judge"] == {"name": "brightness", "version": "1"}
    assert (results["seed"], results["samples"], results["settings"]) == (3, 1, SETTINGS)
    assert results["versions"]["clvr-jax"]
    assert [entry["prompt"] for entry in results["pictures"]] == [entry["prompt"] for entry in METADATA]
    assert set(results["summary"]["tags"]) == {"colors", "counting"}
    assert set(results["summary"]["tiers"]) == {"0", "1", "2"}
    for entry in results["pictures"]:
        picture = np.asarray(Image.open(tmp_path / f"{entry['index']:05d}" / "samples" / "0000.png"))
        assert entry["correct"] == (picture.mean() > 100)
        assert entry["reasons"] == ([] if entry["correct"] else ["too dark"])
        assert entry["nfe"] == 4
        assert entry["seconds"] >= 0


def test_seed_follows_from_prompt_and_sample_only(tmp_path):
    one, two, three = Draw(), Draw(), Draw()
    go(tmp_path / "a", one, samples=2)
    run_function(METADATA[3:], two, tmp_path / "b", JUDGE, settings={}, samples=2)
    go(tmp_path / "c", three, samples=2, seed=1)
    assert len({seed for _, seed in one.asked}) == 10
    assert two.asked == one.asked[6:]
    assert not {seed for _, seed in one.asked} & {seed for _, seed in three.asked}


def test_broken_off_run_goes_on_where_it_was(tmp_path):
    at_once, first, second, third = Draw(), Draw(fail_after=2), Draw(), Draw()
    whole = go(tmp_path / "whole", at_once)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "out", first)
    resumed = go(tmp_path / "out", second)
    assert len(first.asked) == 2
    assert first.asked + second.asked == at_once.asked
    assert [entry["correct"] for entry in resumed["pictures"]] == [entry["correct"] for entry in whole["pictures"]]
    go(tmp_path / "out", third)
    assert third.asked == []


def test_lost_picture_is_drawn_again(tmp_path):
    go(tmp_path)
    (tmp_path / "00002" / "samples" / "0000.png").unlink()
    draw_all = Draw()
    go(tmp_path, draw_all)
    assert [prompt for prompt, _ in draw_all.asked] == ["p 2"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"settings": {**SETTINGS, "steps": 28}}, "settings.steps: 4 on disk, 28 requested"),
        ({"settings": {**SETTINGS, "budget": {"max_steps": 1}}}, "settings.budget.max_steps: 8 on disk, 1 requested"),
        ({"seed": 1}, "seed: 0 on disk, 1 requested"),
        ({"samples": 4}, "samples: 1 on disk, 4 requested"),
        ({"benchmark": GenEval()}, '"shapes" on disk, "geneval" requested'),
    ],
)
def test_folder_of_other_settings_is_refused(tmp_path, changes, difference):
    go(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    draw_all = Draw()
    with pytest.raises(ClvrError, match=re.escape(difference)) as caught:
        go(tmp_path, draw_all, **changes)
    assert "\n" not in str(caught.value)
    assert draw_all.asked == []
    assert (tmp_path / "results.json").read_bytes() == before


def test_folder_of_other_prompts_is_refused(tmp_path):
    go(tmp_path)
    with pytest.raises(ClvrError, match="prompts: 5 on disk, 4 requested"):
        run_function(METADATA[:4], Draw(), tmp_path, JUDGE, settings=SETTINGS)
    with pytest.raises(ClvrError, match="metadata_sha256"):
        run_function(METADATA[::-1], Draw(), tmp_path, JUDGE, settings=SETTINGS)
    (tmp_path / "benchmark.json").unlink()
    with pytest.raises(ClvrError, match=r"no benchmark\.json"):
        go(tmp_path)


def test_missing_pictures_fail_instead_of_shrinking_the_score(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Draw(fail_after=2))
    with pytest.raises(ClvrError, match=r"3 of 5 images are missing \(00002/samples/0000\.png, 00003/"):
        score(tmp_path, JUDGE)
    assert not (tmp_path / "results.json").exists()


def test_folders_that_hold_no_run_cannot_be_scored(tmp_path):
    with pytest.raises(ClvrError, match=r"benchmark\.json: no such file"):
        score(tmp_path, JUDGE)
    (tmp_path / "benchmark.json").write_text('{"seed": 0}')
    with pytest.raises(ClvrError, match="lacks benchmark, settings, samples, prompts"):
        score(tmp_path, JUDGE)


def test_another_judge_scores_the_same_pictures(tmp_path):
    go(tmp_path)
    results = score(tmp_path, ImageChecker("strict", "2", lambda image, metadata: Score.binary(False, ("no",))))
    assert results["judge"]["name"] == "strict"
    assert results["summary"]["overall"]["mean_of_tags"] == 0


def test_closed_loop_keeps_its_trajectories(tmp_path):
    def draw_all(prompts, seeds):
        script = {prompt: [generate(), again(1), stop()] for prompt in prompts}
        script["p 3"] = ["?"]
        return run_loop(prompts, ScriptedController(script), CountingDrawer(5), Budget(max_parse_retries=0), seeds)

    results = go(tmp_path, draw_all, batch_size=5)
    trajectory = Trajectory.load(tmp_path / "00001" / "trajectories" / "0000")
    picture = np.asarray(Image.open(tmp_path / "00001" / "samples" / "0000.png"))
    np.testing.assert_array_equal(picture, trajectory.image)
    assert (trajectory.prompt, trajectory.outcome) == ("p 1", "accepted")
    without = results["pictures"][3]
    assert (without["correct"], without["outcome"], without["nfe"]) == (False, "unparseable", 0)
    assert without["reasons"] == ["no image was generated (unparseable)"]
    assert not (tmp_path / "00003" / "samples").exists()
    assert results["summary"]["cost"]["steps"] == {"0": 1, "2": 4}
    assert results["summary"]["cost"]["outcomes"] == {"accepted": 4, "unparseable": 1}
    assert results["summary"]["cost"]["nfe_per_picture"] == 8
    resumed = Draw()
    go(tmp_path, resumed)
    assert resumed.asked == []


def test_plain_pictures_are_fine_and_wrong_answers_are_not(tmp_path):
    results = go(tmp_path / "pil", lambda prompts, seeds: [Image.new("RGB", (3, 3), "white")] * len(prompts))
    assert results["summary"]["overall"]["mean_of_tags"] == 1
    assert results["pictures"][0]["nfe"] is None
    with pytest.raises(ClvrError, match="asked the system for 2 images and got 1"):
        go(tmp_path / "few", lambda prompts, seeds: [Image.new("RGB", (3, 3))])
    with pytest.raises(ClvrError, match="without an image"):
        go(tmp_path / "none", lambda prompts, seeds: [None] * len(prompts))
    with pytest.raises(ClvrError, match="expected uint8"):
        go(tmp_path / "float", lambda prompts, seeds: [np.zeros((3, 3, 3))] * len(prompts))


def test_what_endpoints_charge_is_written_down(tmp_path):
    usage = Usage(calls=1, input_tokens=20, pictures=1, dollars=0.04)
    picture = np.full((3, 3, 3), 255, np.uint8)
    results = go(
        tmp_path, lambda prompts, seeds: [ImageResponse(picture, usage)] * len(prompts), device="somewhere else"
    )
    entry, cost = results["pictures"][0], results["summary"]["cost"]
    assert (entry["input_tokens"], entry["dollars"], entry["device"]) == (20, 0.04, "somewhere else")
    assert (cost["dollars"], cost["devices"]) == (pytest.approx(0.2), {"somewhere else": 5})
    assert score(tmp_path, JUDGE)["summary"]["cost"] == cost


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(UsageError, match="no prompts"):
        run_function([], Draw(), tmp_path, JUDGE, settings={})
    with pytest.raises(UsageError, match="samples"):
        go(tmp_path, samples=0)


def test_progress_counts_up_to_all(tmp_path):
    seen = []
    go(tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(ClvrError, match="cannot be") as caught:
            go(folder)
        assert "\n" not in str(caught.value)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.evaluation.benchmarks.test_shapes import Draw, go
class Deadly(Draw):
    def __call__(self, prompts, seeds):
        if len(self.asked) >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(prompts, seeds)
go({out!r}, Deadly())
"""


def test_killed_run_loses_only_the_batch_in_flight(tmp_path):
    script = KILLED.format(root=str(Path(__file__).parents[3]), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    draw_all = Draw()
    go(tmp_path, draw_all)
    assert [prompt for prompt, _ in draw_all.asked] == ["p 2", "p 3", "p 4"]


def test_judge_of_the_shapes_world(tmp_path):
    metadata = [entry for entry in evaluation_prompts("eval") if entry["tag"] == "colors"][:2]

    def draw_first_only(prompts, seeds):
        item = metadata[0]["include"][0]
        x, y = cell_center("center")
        right = render(Scene((SceneObject(item["color"], item["class"], "center", x, y, 8.0),)))
        return [right if prompt == metadata[0]["prompt"] else render(Scene()) for prompt in prompts]

    results = run_function(metadata, draw_first_only, tmp_path, shapes_checker(), settings={})
    assert [entry["correct"] for entry in results["pictures"]] == [True, False]
    assert results["pictures"][1]["reasons"]
