"""The fine-tuning recipes give one run, whether on one device or spread over two processes."""

import sys

import numpy as np
import pytest

from clvr_jax.data.trajectory_dataset import write_dataset
from tests.data.simulated import simulated
from tests.training.test_interruptions import ROOT, losses, run

ALONE = [sys.executable, "-m", "clvr_jax.cli", "train"]
CLUSTER = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), "--processes", "2", "--devices", "4"]
OPTIONS = [
    *("--model", "shapes-tiny", "--batch-size", "8"),
    *("--train.steps", "20", "--train.log-every", "1", "--train.learning-rate", "1e-4"),
    *("--train.compute-dtype", "float32"),
]
TWO_PICTURES = (10, 23, 31, 52)
"""Seeds of trajectories with two pictures and texts of like lengths: few programs to compile."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "trajectories"
    write_dataset(folder, map(simulated, TWO_PICTURES))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["flux2_sft", "qwen3_vl_sft"])
def test_two_processes_of_four_devices_train_as_one_device_does(dataset, tmp_path, recipe):
    options = [str(ROOT / "configs" / f"{recipe}.py"), *OPTIONS, "--dataset", str(dataset)]
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    for command, out in (([*ALONE, *options, "--train.mesh.devices", "1"], alone), ([*CLUSTER, *options], spread)):
        done = run(command, out)
        assert done.returncode == 0, done.stderr
    expected, found = (np.array(losses(out)) for out in (alone, spread))
    assert expected[:, 0].tolist() == list(range(1, 21))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len({loss for _, loss in losses(alone)}) == 20
    exported = [sorted(path.relative_to(out) for path in (out / "export").rglob("*")) for out in (alone, spread)]
    assert exported[0] == exported[1]
