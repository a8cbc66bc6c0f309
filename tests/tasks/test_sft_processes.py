"""The fine-tuning recipes give one run, whether on one device or spread over two processes."""

import sys

import numpy as np
import pytest

from clvr_jax.cli import main
from clvr_jax.data.trajectories.dataset import write_dataset
from clvr_jax.data.trajectories.record import TrajectoryRecord
from tests.data.simulated import TWO_IMAGES, simulated
from tests.training.test_interruptions import ROOT, losses, run

CLUSTER = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), "--processes", "2", "--devices", "1"]
STEPS = 3
OPTIONS = [
    *("--batch-size", "2"),
    *("--train.steps", str(STEPS), "--train.log-every", "1", "--train.learning-rate", "1e-4"),
    *("--train.compute-dtype", "float32"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The first of two images is a mistake, so all targets have one reference: one program for each number of devices.

    That all processes read batches of one shape is tested by `tests/data/test_sft_input.py`.
    """
    folder = tmp_path_factory.mktemp("data") / "trajectories"
    write_dataset(folder, [TrajectoryRecord(str(seed), simulated(seed), mistakes=(0,)) for seed in TWO_IMAGES])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "model"), [("flux2_sft", "small_flux2"), ("qwen3_vl_sft", "small_qwen3_vl")])
def test_two_processes_train_as_one_does(dataset, tmp_path, request, recipe, model):
    model = request.getfixturevalue(model)
    options = [str(ROOT / "configs" / f"{recipe}.py"), *OPTIONS, "--model", str(model), "--dataset", str(dataset)]
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    assert main(["train", *options, "--out", str(alone), "--train.mesh.devices", "1"]) == 0
    done = run([*CLUSTER, *options], spread)
    assert done.returncode == 0, done.stderr
    expected, found = (np.array(losses(out)) for out in (alone, spread))
    assert expected[:, 0].tolist() == list(range(1, STEPS + 1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len({loss for _, loss in losses(alone)}) == STEPS
    exported = [sorted(path.relative_to(out) for path in (out / "export").rglob("*")) for out in (alone, spread)]
    assert exported[0] == exported[1]
