"""Ctrl-C and SIGTERM in a run of two processes, and a second run into the same directory.

The processes are started as on a pod, `launch/train.py` on each host, here joined over loopback with one device each.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from clvr_jax.cli import main
from clvr_jax.training.distributed import virtual_devices
from launch.local_cluster import free_port
from tests.training.test_interruptions import RECIPE, ROOT, TRAIN, losses, start

LAUNCH = [sys.executable, str(ROOT / "launch" / "train.py")]
SAVED = "step {} is saved, --resume continues the run"
INTERRUPTED, STOPPED = f"clvr: interrupted; line: {SAVED}", f"line: asked to stop; {SAVED}"

pytestmark = pytest.mark.slow


def launch(out, *options):
    """Starts two processes of one run, each in a process group of its own; returns them without waiting."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **virtual_devices(1)}
    coordinator = f"127.0.0.1:{free_port()}"
    joined = [*LAUNCH, "--coordinator", coordinator, "--processes", "2", "--process"]
    return [
        subprocess.Popen(
            [*joined, str(number), str(RECIPE), "--out", str(out), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number in range(2)
    ]


def wait_for_step(out, processes, step=6):
    deadline = time.monotonic() + 200
    while len(losses(out)) < step:
        assert all(process.poll() is None for process in processes), [each.communicate()[1] for each in processes]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def endings(processes):
    """Exit codes, and for each process the lines of our own that say how the run ended."""
    outputs = [process.communicate(timeout=100) for process in processes]
    assert not [printed for printed, _ in outputs if "export" in printed]  # what was not written is not announced
    said = [errors.splitlines() for _, errors in outputs]
    ours = [[line for line in lines if "interrupted" in line or "asked to stop" in line] for lines in said]
    assert not [line for lines in said for line in lines if "Traceback" in line]
    return [process.returncode for process in processes], ours


def everywhere(number):
    """A terminal sends Ctrl-C to the launcher and to its worker; SIGTERM reaches the launcher, which hands it on."""

    def send(processes):
        for process in processes:
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)

    return send


def only_process_1(number):
    return lambda processes: everywhere(number)(processes[1:])


@pytest.mark.parametrize(
    ("send", "codes", "lines"),
    [
        pytest.param(everywhere(signal.SIGINT), [130, 130], [INTERRUPTED, INTERRUPTED], id="Ctrl-C"),
        pytest.param(only_process_1(signal.SIGINT), [143, 130], [STOPPED, INTERRUPTED], id="Ctrl-C on one host"),
        pytest.param(everywhere(signal.SIGTERM), [143, 143], [STOPPED, STOPPED], id="SIGTERM"),
        pytest.param(only_process_1(signal.SIGTERM), [143, 143], [STOPPED, STOPPED], id="SIGTERM on one host"),
    ],
)
def test_both_processes_save_the_same_step_and_end_with_one_line(send, codes, lines, tmp_path):
    out = tmp_path / "run"
    processes = launch(
        out, "--pause", "0.1", "--train.checkpoint.save-interval-minutes", "1000", "--train.steps", "400"
    )
    wait_for_step(out, processes)
    send(processes)
    found, said = endings(processes)
    (step,) = (int(path.name) for path in (out / "checkpoints").iterdir())
    assert said == [[line.format(step)] for line in lines]
    assert found == codes
    assert losses(out)[-1][0] == step
    assert not (out / "export").exists()
    assert not (out / ".lock").exists()


def test_a_second_run_into_one_directory_is_refused_and_the_first_is_unharmed(tmp_path, capsys):
    out, alone = tmp_path / "run", tmp_path / "alone"
    options = ["--train.steps", "600", "--train.mesh.devices", "1", "--train.checkpoint.save-interval-minutes", "1000"]
    assert main(["train", str(RECIPE), "--out", str(alone), *options]) == 0
    first = start(TRAIN, out, "--pause", "1", *options)  # ten minutes: it lasts until it is asked to stop
    recipe = (out / "recipe.json").read_bytes()
    capsys.readouterr()
    ends = []
    for more in ((), ("--resume",)):
        other = ["train", str(RECIPE), "--out", str(out), *options, "--train.learning-rate", "9", *more]
        ends.append((main(other), capsys.readouterr().err))
    ends += [(process.wait(100), process.stderr.read()) for process in launch(out, *options)]
    assert first.poll() is None
    for code, stderr in ends:
        assert code == 1
        (line,) = [line for line in stderr.splitlines() if line.startswith("clvr: ")]
        assert f"{out}: process {first.pid} (cli.py train " in line
        assert "has been writing to it since" in line
        assert "Traceback" not in stderr
    assert (out / "recipe.json").read_bytes() == recipe
    assert json.loads((out / ".lock").read_text())["process"] == first.pid
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=100)
    assert first.returncode == 0, said
    reached = losses(out)
    assert reached == losses(alone)[: len(reached)]
    assert [int(path.name) for path in (out / "checkpoints").iterdir()] == [reached[-1][0]]
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()} - {"export"}
