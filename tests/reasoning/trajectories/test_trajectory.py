import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory, Verdict
from clvr_jax.reasoning.trajectories.page import render
from clvr_jax.reasoning.trajectories.trajectory import best_step, package_versions
from clvr_jax.reasoning.verification.verification import Requirement, Verification
from tests.reasoning.scripted import picture


def make(values=(10, 20, 30), prompt="a cat & a «dog»"):
    steps = [
        Step(
            f"Reply {number}.",
            IMAGE_GEN,
            tuple(range(number)),
            picture(value),
            Verdict(("x", "y")[: len(values) - 1 - number], "I see."),
            nfe=4,
            seconds=0.5,
            rolled_back=number == 1,
            attempts=2,
            redraw=number,
            seed=number,
            left_out=number // 2,
        )
        for number, value in enumerate(values)
    ]
    return Trajectory(prompt, (*steps, Step("Unmet: nothing.", TERMINATE)), "accepted", "toy", 5, {"numpy": "2"}, 1.5)


def test_save_and_load_give_the_same(tmp_path):
    trajectory = make()
    folder = trajectory.save(tmp_path / "deep" / "out")
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.html",
        "step_00.png",
        "step_01.png",
        "step_02.png",
        "trajectory.json",
    ]
    loaded = Trajectory.load(folder)
    assert loaded == trajectory
    for ours, theirs in zip(trajectory.generated, loaded.generated, strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)
    data = json.loads((folder / "trajectory.json").read_text())
    assert (data["best"], data["image"], data["nfe"], data["outcome"]) == (2, "step_02.png", 12, "accepted")
    assert set(data["steps"][0]) >= {"reasoning", "action", "references", "image", "verdict", "nfe", "seconds"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_saved_folder_has_the_users_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    folder = make().save(tmp_path / "out")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_pil_pictures_of_any_mode_are_saved_as_rgb(tmp_path):
    image = Image.new("RGBA", (5, 3), (1, 2, 3, 255))
    Trajectory("p", (Step("r", IMAGE_GEN, image=image),), "step limit").save(tmp_path / "out")
    assert Trajectory.load(tmp_path / "out").image.tolist() == [[[1, 2, 3]] * 5] * 3


def test_prompt_that_is_no_utf8_survives(tmp_path):
    trajectory = make(prompt="caf\udce9")
    assert Trajectory.load(trajectory.save(tmp_path / "out")).prompt == "caf\udce9"


def test_shorter_trajectory_replaces_a_longer_one_and_foreign_files_stay(tmp_path):
    folder = make().save(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    (folder / "step_extra.png").write_text("mine")
    make(values=(77,)).save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.html",
        "notes.txt",
        "step_00.png",
        "step_extra.png",
        "trajectory.json",
    ]
    assert Trajectory.load(folder).image[0, 0, 0] == 77


# Kills itself at the n-th change of the file system, for n = 0, 1, ... until a save gets through.
KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from tests.reasoning.trajectories.test_trajectory import make

def save(target, left):
    def guard(name):
        original = getattr(pathlib.Path, name)
        def guarded(self, *args, **kwargs):
            nonlocal left
            if left == 0:
                if name == "write_bytes":
                    self.open("wb").write(args[0][:20])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return original(self, *args, **kwargs)
        setattr(pathlib.Path, name, guarded)
    for name in ("mkdir", "write_bytes", "rename", "replace", "unlink", "rmdir"):
        guard(name)
    make(values=(200,) * 2).save(target)

for moment in range(30):
    target = pathlib.Path(sys.argv[1], str(moment), "out")
    target.parent.mkdir()
    if {exists}:
        make(values=(100,) * 3).save(target)
    child = os.fork()  # a process to be killed costs no import
    if child == 0:
        save(target, moment)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    if code != -9:
        break
"""


@pytest.mark.parametrize("exists", [False, True])
def test_killed_save_leaves_a_whole_trajectory_or_none(tmp_path, exists):
    script = KILLED.format(root=str(Path(__file__).parents[3]), exists=exists)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    codes = list(map(int, done.stdout.split()))
    assert codes == [-9] * (len(codes) - 1) + [0]
    seen = set()
    for moment in range(len(codes)):
        target = tmp_path / str(moment) / "out"
        if not (target / "trajectory.json").exists():
            seen.add("none")
        else:
            trajectory = Trajectory.load(target)
            values = {int(step.image[0, 0, 0]) for step in trajectory.generated}
            assert (values, len(trajectory.generated)) in (({100}, 3), ({200}, 2))
            seen |= values
        make(values=(1,)).save(target)  # what is left there is no obstacle
        assert Trajectory.load(target).image[0, 0, 0] == 1
    assert seen == ({100, "none", 200} if exists else {"none", 200})
    assert not list(tmp_path.rglob(".*"))


def test_full_disk_is_one_line_and_keeps_the_old(tmp_path, monkeypatch):
    folder = make(values=(9,)).save(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ClvrError, match="No space left") as caught:
            make().save(target)
        assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_target_that_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nothing/out"), tmp_path / ("x" * 300)):
        with pytest.raises(ClvrError, match="cannot save the trajectory"):
            make().save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(ClvrError, match=r"no trajectory\.json"):
        Trajectory.load(tmp_path)
    folder = make().save(tmp_path / "out")
    path = folder / "trajectory.json"
    good = json.loads(path.read_text())

    def broken(change, match):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(ClvrError, match=match):
            Trajectory.load(folder)

    broken(lambda data: data.update(format=99), "format 1")
    broken(lambda data: data.pop("prompt"), "lacks prompt")
    broken(lambda data: data.update(outcome="fine"), "outcome must be one of")
    broken(lambda data: data["steps"][0].update(image="../../secret.png"), "step_<number>")
    broken(lambda data: data["steps"][0].update(image="step_09.png"), "no such image")
    broken(lambda data: data["steps"][0].update(references=[2]), "no earlier image")
    broken(lambda data: data["steps"][0].update(verdict=3), r"steps\[0\]: verdict must be a JSON object, got 3")
    path.write_text("{")
    with pytest.raises(ClvrError, match="not JSON"):
        Trajectory.load(folder)
    path.write_text(json.dumps(good))
    (folder / "step_00.png").write_bytes((folder / "step_00.png").read_bytes()[:40])
    with pytest.raises(ClvrError, match="not a readable image"):
        Trajectory.load(folder)


def test_best_is_fewest_unmet_then_latest_and_never_an_unjudged_one():
    def steps(*counts):
        return [
            Step("r", IMAGE_GEN, image=picture(0), verdict=None if count is None else Verdict(("x",) * count))
            for count in counts
        ]

    assert best_step(steps(2, 1, 3)) == 1
    assert best_step(steps(1, 1, 3)) == 1
    assert best_step(steps(3, None)) == 0
    assert best_step(steps(None, None)) == 1
    assert best_step([]) is None


def test_an_accepted_image_is_better_than_one_whose_expected_number_of_met_requirements_is_higher():
    def verified(*requirements):
        checked = tuple(Requirement("x", met, probability) for met, probability in requirements)
        return Step("r", IMAGE_GEN, image=picture(0), verification=Verification(checked))

    doubtful = verified((True, 0.99), (True, 0.99), (False, 0.7))
    accepted = verified((True, 0.85), (True, 0.85), (True, 0.85))
    assert doubtful.score > accepted.score
    assert best_step([doubtful, accepted, doubtful]) == 1
    assert best_step([accepted, doubtful]) == 0


def test_steps_and_trajectories_are_validated():
    with pytest.raises(ClvrError, match="without an image"):
        Step("r", IMAGE_GEN)
    with pytest.raises(ClvrError, match="with an image"):
        Step("r", TERMINATE, image=picture(0))
    with pytest.raises(ClvrError, match="outcome"):
        replace(make(), outcome="done")
    with pytest.raises(ClvrError, match="expected uint8"):
        Trajectory("p", (Step("r", IMAGE_GEN, image=np.zeros((4, 4, 3))),), "step limit").save("unused")


def test_a_trajectory_of_an_earlier_version_left_nothing_out(tmp_path):
    folder = make().save(tmp_path / "out")
    data = json.loads((folder / "trajectory.json").read_text())
    assert [step.pop("left_out") for step in data["steps"]] == [0, 0, 1, 0]
    (folder / "trajectory.json").write_text(json.dumps(data))
    assert [step.left_out for step in Trajectory.load(folder).steps] == [0] * 4


def test_the_page_says_what_the_generator_did_not_read():
    step = replace(make().steps[0], left_out=3)
    assert "generated without the oldest replies (3)" in render(Trajectory("p", (step,), "step limit"))


def test_versions_name_packages_that_are_not_installed():
    versions = package_versions("no-such-package")
    assert versions["no-such-package"] == "not installed"
    assert versions["numpy"] == np.__version__


SCRIPT = "<script>alert(1)</script>"


@pytest.mark.parametrize(
    "field", ["attempts", "redraw", "seed", "nfe", "seconds", "rolled_back", "references", "reasoning", "left_out"]
)
@pytest.mark.parametrize("value", [SCRIPT, [SCRIPT], {"x": SCRIPT}, -1.5, float("nan"), 10**400])
def test_fields_of_a_loaded_step_have_their_types(field, value, tmp_path):
    if field == "reasoning" and value == SCRIPT:
        return  # a text, which the page escapes
    folder = make().save(tmp_path / "out")
    data = json.loads((folder / "trajectory.json").read_text())
    data["steps"][0][field] = value
    (folder / "trajectory.json").write_text(json.dumps(data))
    with pytest.raises(ClvrError, match=rf"trajectory\.json: steps\[0\]: {field} must be ") as caught:
        Trajectory.load(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("field", ["seed", "seconds", "versions", "model", "prompt", "outcome", "steps"])
@pytest.mark.parametrize("value", [None, True, [SCRIPT], float("inf")])
def test_fields_of_a_loaded_trajectory_have_their_types(field, value, tmp_path):
    folder = make().save(tmp_path / "out")
    data = json.loads((folder / "trajectory.json").read_text())
    (folder / "trajectory.json").write_text(json.dumps({**data, field: value}))
    with pytest.raises(ClvrError, match=rf"trajectory\.json: {field}"):
        Trajectory.load(folder)


def test_a_page_escapes_what_no_type_check_has_seen():
    step = replace(make().steps[0], attempts=SCRIPT, redraw=SCRIPT, seed=SCRIPT)
    page = render(Trajectory("p", (step,), "step limit", seed=SCRIPT))
    assert SCRIPT not in page
    assert page.count("&lt;script&gt;") >= 3
