"""A run in a bucket equals one on a disk bit for bit, whatever the server and the machine do in between."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.training.checkpoint import Checkpoints, refuse_occupied, restore_part
from clvr_jax.training.recipes import RECIPE, export_run, load_recipe, train
from tests.commands.command_line import RECIPE as TEXT
from tests.commands.command_line import complaint
from tests.helpers.bucket_server import InjectedFault
from tests.training import bucket_worker

ROOT = Path(__file__).parents[2]
LINE = Path(__file__).with_name("line_recipe.py")
STOPPING = Path(__file__).with_name("stopping_recipe.py")
RUN = storage_path("gs://runs/a/run")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "vector.py"
    path.write_text(TEXT)
    return load_recipe(path)


@pytest.fixture(scope="module")
def on_a_disk(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("disk") / "run"
    train(recipe, recipe.config, out)
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def losses(content):
    return [(row["step"], row["loss"]) for row in map(json.loads, content.decode().splitlines())]


def in_bucket(bucket, out="a/run"):
    """The files of a run by their relative names."""
    return {name.removeprefix(f"{out}/"): content for name, content in bucket.objects(f"{out}/").items()}


def check_same(found, expected):
    """Compares a run in a bucket with one on a disk."""
    assert losses(found["metrics.jsonl"]) == losses(expected["metrics.jsonl"])
    assert found[RECIPE] == expected[RECIPE]
    for name in (name for name in expected if name.startswith("export/")):
        assert found[name] == expected[name]
    assert "export/commit_success.txt" in found
    hidden = {name for name in found if name.startswith(".")}
    assert not hidden  # no lock, nothing of a check


def test_a_run_in_a_bucket_has_the_files_of_one_on_a_disk(bucket, recipe, on_a_disk):
    result = train(recipe, recipe.config, "gs://runs/a/run")
    assert result == {"recipe": "vector", "out": str(RUN), "export": f"{RUN}/export", "steps": 4}
    found = in_bucket(bucket)
    check_same(found, on_a_disk)
    assert {name.partition("/")[0] for name in found} == {name.partition("/")[0] for name in on_a_disk}
    assert "checkpoints/4/commit_success.txt" in found
    written = [seen.name for seen in bucket.seen if seen.writes]
    order = ["metrics.jsonl", "checkpoints/4/state/_METADATA", "checkpoints/4/commit_success.txt", "export/x.npy"]
    assert sorted(order, key=lambda name: written.index(f"a/run/{name}")) == order


def test_a_finished_run_is_refused_and_resumed_without_a_change(bucket, recipe):
    train(recipe, recipe.config, RUN)
    before = in_bucket(bucket)
    with pytest.raises(UsageError, match="checkpoints already holds step 4; add --resume"):
        train(recipe, recipe.config, RUN)
    assert in_bucket(bucket) == before
    train(recipe, recipe.config, RUN, resume=True)
    after = in_bucket(bucket)
    assert {name for name in before if before[name] != after.get(name)} <= {"export/x.npy", "export/commit_success.txt"}
    assert after["export/x.npy"] == before["export/x.npy"]


def test_a_run_is_exported_from_a_bucket(bucket, recipe, on_a_disk, tmp_path, capsys):
    train(recipe, recipe.config, RUN)
    assert export_run("gs://runs/a/run", tmp_path / "export") == 4
    assert (tmp_path / "export" / "x.npy").read_bytes() == on_a_disk["export/x.npy"]
    assert main(["convert", str(RUN), str(tmp_path / "again"), "--to", "torch"]) == 0
    assert (tmp_path / "again" / "x.npy").read_bytes() == on_a_disk["export/x.npy"]
    capsys.readouterr()
    assert main(["convert", "gs://runs/models/klein", str(tmp_path / "third"), "--to", "jax"]) == 1
    assert "gs://runs/models/klein: nothing is stored there; give a directory in a bucket" in complaint(capsys)


def test_what_a_killed_run_left_incomplete_is_removed_and_never_restored(bucket):
    state = {"params": {"w": jnp.arange(6.0)}, "step": jnp.int32(2)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state["params"])
    run = RUN / "checkpoints"
    with Checkpoints(run) as checkpoints:
        checkpoints.save(2, state, {"position": 1})
        checkpoints.save(4, jax.tree.map(lambda x: x + 1, state), {"position": 2})
    with pytest.raises(UsageError, match="already holds step 4"):
        refuse_occupied(run, resume=False)
    objects.delete(run / "4" / objects.COMMIT)  # as if the process had been killed before it wrote it
    with pytest.raises(UsageError, match="already holds step 2"):
        refuse_occupied(run, resume=False)
    params, step = restore_part(run, "params", abstract)
    assert step == 2
    with Checkpoints(run) as checkpoints:
        restored, position = checkpoints.restore(state, resume=True)
        assert position == {"position": 1}
        assert {name.partition("/")[0] for name in objects.names(run)} == {"2"}
        checkpoints.save(4, state, {"position": 3})
    assert np.array_equal(params["w"], restored["params"]["w"])
    assert restore_part(run, "params", abstract)[1] == 4
    # Killed while it deleted the older one, of which anything may be left.
    for name in objects.names(run / "2"):
        if not name.endswith(objects.COMMIT):
            objects.delete(run / "2" / name)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(state, resume=True)[1] == {"position": 3}
        checkpoints.save(6, state, {"position": 4})
        checkpoints.save(8, state, {"position": 5})
    assert {name.partition("/")[0] for name in objects.names(run)} == {"6", "8"}


def test_two_runs_never_write_to_one_directory(bucket, recipe, on_a_disk):
    said = []
    real = recipe.task

    def task(config):
        with pytest.raises(ClvrError, match=r"a/run: process \d+ .* has been writing to it since") as caught:
            train(recipe, recipe.config, RUN, resume=True)
        said.append(caught.value)
        return real(config)

    train(recipe.__class__(**{**vars(recipe), "task": task}), recipe.config, RUN)
    assert len(said) == 1
    check_same(in_bucket(bucket), on_a_disk)


@pytest.mark.parametrize("kinds", [[429, 503], ["torn", "lost"], [500, "slow", "torn", "lost", 429, 503]])
def test_a_server_with_faults_changes_nothing(bucket, recipe, on_a_disk, kinds):
    """About one of eight requests fails; each client repeats its own."""
    rng, share = random.Random(str(kinds)), 1 / (8 * len(kinds))
    faults = [InjectedFault(kind, 10**6, lambda seen: rng.random() < share) for kind in kinds]
    with bucket.with_faults(*faults):
        train(recipe, recipe.config, RUN)
    assert sum(fault.met for fault in faults) >= 5
    check_same(in_bucket(bucket), on_a_disk)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that Orbax left
@pytest.mark.parametrize(
    ("name", "reason"),
    [("_CHECKPOINT_METADATA", "Forbidden: quotaExceeded"), ("state/d/", "PERMISSION_DENIED: quotaExceeded")],
)
def test_a_quota_that_is_full_keeps_the_last_checkpoint(bucket, recipe, name, reason, capfd):
    """Both clients that write a checkpoint meet it, gcsfs and TensorStore."""
    command = ["train", str(recipe.path), "--out", str(RUN)]
    assert main([*command, "--train.steps", "2"]) == 0
    capfd.readouterr()
    full = InjectedFault(
        403, 10**6, lambda seen: seen.writes and f"/checkpoints/4/{name}" in seen.name, "quotaExceeded"
    )
    with bucket.with_faults(full):
        assert main([*command, "--resume"]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("clvr: ")]
    assert f"a checkpoint cannot be written ({reason})" in line
    assert "the last complete one is step 2, --resume continues from it" in line
    assert main([*command, "--resume"]) == 0
    assert [step for step, _ in losses(in_bucket(bucket)["metrics.jsonl"])] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("gs://no-such-bucket/run", "there is no bucket no-such-bucket"),
        ("gs://Runs/run", "not the name of a bucket"),
        ("gs://runs/../run", "not a name for files in a bucket"),
        ("s3://runs/run", "s3://runs/run: a URL, not a file or directory of this machine"),
    ],
)
def test_an_address_that_cannot_be_written_is_one_line(bucket, recipe, out, said, capsys):
    assert main(["train", str(recipe.path), "--out", out]) in (1, 2)
    assert said in complaint(capsys)


def test_no_permission_is_one_line(bucket, recipe, capsys):
    with bucket.with_faults(InjectedFault(403, 99, reason="storage.objects.create")):
        assert main(["train", str(recipe.path), "--out", str(RUN)]) == 1
    assert "give the account the roles" in complaint(capsys)
    assert bucket.objects() == {}


def test_a_recipe_with_a_loop_of_its_own_needs_a_disk(bucket, recipe):
    def own_loop(task, config, out, *, resume):
        raise AssertionError("it must not be called")

    own = recipe.__class__(**{**vars(recipe), "fit": own_loop})
    with pytest.raises(UsageError, match=r"a/run: .*vector\.py has a `fit` of its own"):
        train(own, own.config, RUN)
    assert bucket.objects() == {}


def test_a_run_that_is_killed_at_ten_random_moments_equals_one_that_was_not(bucket, tmp_path):
    """A moment is a request of the run, before it is answered. With a checkpoint after each step, of which one is kept,
    most requests are those of checkpoints that are written or deleted."""
    options = ["--train.steps", "12", "--train.mesh.devices", "1", "--train.checkpoint.max-to-keep", "1"]
    command = ["train", str(LINE), *options]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([bucket_worker.__name__])
    rng, kills = random.Random(0), 0
    for _ in range(11):
        arguments = [*command, "--out", str(RUN), "--resume"]
        process = context.Process(target=bucket_worker.run, args=(arguments, bucket.environment))
        count, last = itertools.count(1), rng.randrange(5, 250) if kills < 10 else None

        def kill(seen, count=count, last=last, process=process):
            if next(count) == last:
                os.kill(process.pid, signal.SIGKILL)

        bucket.before_answer = kill
        process.start()
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        if process.exitcode == 0:
            break
    assert kills == 10
    found = in_bucket(bucket)
    assert losses(found["metrics.jsonl"]) == losses((tmp_path / "run" / "metrics.jsonl").read_bytes())
    assert found["export/w.npy"] == (tmp_path / "run" / "export" / "w.npy").read_bytes()
    assert found["export/commit_success.txt"]
    assert not [name for name in found if name.startswith(".")]
    steps = {name.split("/")[1] for name in found if name.startswith("checkpoints/")}
    assert steps == {"12"}


def test_two_processes_then_one_then_two_equal_the_same_on_a_disk(bucket, tmp_path):
    def run(out):
        for processes, stop_after in ((2, 4), (1, 8), (2, 12)):
            cluster = ["--processes", str(processes), "--devices", str(8 // processes)]
            options = ["--train.steps", "12", "--out", out, "--resume"]
            done = subprocess.run(
                [sys.executable, str(ROOT / "launch" / "local_cluster.py"), *cluster, str(STOPPING), *options],
                env={**os.environ, "PYTHONPATH": str(ROOT), "STOP_AFTER": str(stop_after)},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr

    run(str(tmp_path / "run"))
    run(str(RUN))
    found = in_bucket(bucket)
    assert losses(found["metrics.jsonl"]) == losses((tmp_path / "run" / "metrics.jsonl").read_bytes())
    assert len(losses(found["metrics.jsonl"])) == 12
    assert found["export/w.npy"] == (tmp_path / "run" / "export" / "w.npy").read_bytes()
    # Each host has written what it holds.
    assert {name.split("/")[3] for name in found if "/ocdbt.process_" in name} == {"ocdbt.process_0", "ocdbt.process_1"}
