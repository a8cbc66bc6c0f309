"""Runs that are killed, asked to stop, spread over processes or left alone give the same losses."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.distributed import virtual_devices
from clvr_jax.training.recipes import export_run, load_recipe, train
from clvr_jax.training.trainer import fit

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("line_recipe.py")
TRAIN = [sys.executable, "-m", "clvr_jax.cli", "train", str(RECIPE)]
CLUSTER = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), "--processes", "2", "--devices", "4", str(RECIPE)]
SAVE_ONCE = ["--train.checkpoint.save-interval-minutes", "1000"]  # at the end of the run, or when it is asked to stop

pytestmark = pytest.mark.slow


def run(command, out, *options):
    return subprocess.run([*command, "--out", str(out), *options], capture_output=True, text=True, timeout=300)


def start(command, out, *options, step=8):
    """Starts a run and returns when it has come to a step."""
    process = subprocess.Popen([*command, "--out", str(out), *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(losses(out)) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def losses(out):
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(row["step"], row["loss"]) for row in map(json.loads, filter(lambda line: line.endswith("}"), lines))]


def newest_checkpoint(out):
    return max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["train", str(RECIPE), "--out", str(out), *SAVE_ONCE]) == 0
    assert len(losses(out)) == 40
    return out


def test_a_run_that_is_killed_asked_to_stop_and_interrupted_has_the_same_losses_bit_for_bit(undisturbed, tmp_path):
    """SIGKILL, SIGTERM and Ctrl-C, one after the other; each time the run is resumed. Only the first one loses steps:
    the other two save first, say so, and export nothing."""
    out = tmp_path / "run"
    process = start(TRAIN, out, "--pause", "0.1")
    process.send_signal(signal.SIGKILL)
    process.wait()

    options = ("--resume", "--pause", "0.1", *SAVE_ONCE)
    process = start(TRAIN, out, *options, step=14)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    saved = newest_checkpoint(out)
    assert saved == losses(out)[-1][0] >= 14
    assert f"step {saved} is saved" in told

    process = start(TRAIN, out, *options, step=saved + 4)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 130, told
    saved = newest_checkpoint(out)
    assert saved == losses(out)[-1][0] < 40
    assert told.splitlines()[-1] == f"clvr: interrupted; line: step {saved} is saved, --resume continues the run"
    assert not (out / ".lock").exists()
    assert not (out / "export").exists()

    assert main(["train", str(RECIPE), "--out", str(out), "--resume", *SAVE_ONCE]) == 0
    assert losses(out) == losses(undisturbed)
    assert np.array_equal(np.load(out / "export" / "w.npy"), np.load(undisturbed / "export" / "w.npy"))


def test_a_run_is_exported_as_its_recipe_does_it_before_it_is_finished(tmp_path):
    out, recipe = tmp_path / "run", load_recipe(RECIPE)
    recipe = dataclasses.replace(recipe, fit=functools.partial(fit, stop_after=9))
    mesh = MeshConfig(data=2, fsdp=4)
    config = dataclasses.replace(recipe.config, train=dataclasses.replace(recipe.config.train, mesh=mesh))
    train(recipe, config, out)
    assert export_run(out, tmp_path / "export") == 9
    assert np.load(tmp_path / "export" / "w.npy").shape == (8,)
    command = [sys.executable, "-m", "clvr_jax.cli", "convert", str(out), str(tmp_path / "again"), "--to", "torch"]
    one_device = {**os.environ, **virtual_devices(1)}  # and not the eight of the run
    assert subprocess.run(command, timeout=200, env=one_device).returncode == 0
    assert (tmp_path / "again" / "w.npy").read_bytes() == (tmp_path / "export" / "w.npy").read_bytes()
    with pytest.raises(ClvrError, match="not the directory of a run"):
        export_run(tmp_path, tmp_path / "other")


def test_the_launcher_hands_on_that_it_is_asked_to_stop(tmp_path):
    """Kubernetes and Docker reach the first process only. 143: saved, but not done."""
    out = tmp_path / "run"
    process = start([sys.executable, str(ROOT / "launch" / "train.py"), str(RECIPE)], out, "--pause", "0.1", *SAVE_ONCE)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 143
    assert "is saved, --resume continues the run" in said
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()]


def test_when_one_process_dies_the_other_says_so_and_ends(tmp_path):
    began = time.monotonic()
    done = run(CLUSTER, tmp_path / "run", "--die", "1", "--pause", "0.2")
    assert done.returncode == 1
    assert "another host was lost" in done.stderr
    assert "process" in done.stderr.splitlines()[-1]
    assert time.monotonic() - began < 60 + 90  # a minute, and the time to start


def test_two_processes_of_four_devices_are_one_run_and_end_together_when_asked(undisturbed, tmp_path):
    """Asked by Ctrl-C, which reaches both, then by SIGTERM; each time the run is resumed."""
    out = tmp_path / "run"
    process = start(CLUSTER, out, "--pause", "0.2", *SAVE_ONCE)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=150)
    assert process.returncode == 130, told
    assert "failed" not in told
    interrupted = losses(out)[-1][0]
    assert 8 <= interrupted < 40
    ending = f"clvr: interrupted; line: step {interrupted} is saved, --resume continues the run"
    assert told.splitlines()[-1] == ending
    process = start(CLUSTER, out, "--resume", "--pause", "0.2", *SAVE_ONCE, step=interrupted + 4)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=150)
    assert interrupted + 4 <= losses(out)[-1][0] < 40
    done = run(CLUSTER, out, "--resume", *SAVE_ONCE)
    assert done.returncode == 0, done.stderr
    found, expected = losses(out), losses(undisturbed)
    assert [step for step, _ in found] == [step for step, _ in expected]
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in expected], rtol=1e-5)
    exported = np.load(out / "export" / "w.npy")
    np.testing.assert_allclose(exported, np.load(undisturbed / "export" / "w.npy"), rtol=1e-5)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """Files may not grow beyond 50,000 bytes, as if the disk were full in the middle of the second checkpoint."""
    out = tmp_path / "run"
    recipe = [
        str(RECIPE),
        "--ballast",
        "100000",
        "--train.checkpoint.save-interval-minutes",
        "9",
        "--train.mesh.devices",
        "1",
    ]
    command = ["train", *recipe, "--out", str(out)]
    assert main([*command, "--train.steps", "2"]) == 0
    script = """if True:
        import resource, sys
        from clvr_jax.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        sys.exit(main(["train", *sys.argv[1:]]))
    """
    full = run([sys.executable, "-c", script, *recipe], out, "--train.steps", "4", "--resume")
    assert full.returncode == 1
    # TensorStore's threads write to stderr too, and may do so in the middle of a line of ours.
    said = re.findall("clvr: .*", full.stderr)
    assert len(said) == 1
    assert "a checkpoint cannot be written" in said[0]
    assert "the last complete one is step 2" in said[0]
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]
    assert main([*command, "--train.steps", "4", "--resume"]) == 0
    assert [step for step, _ in losses(out)][-1] == 4
