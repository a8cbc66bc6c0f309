"""The fine-tuning recipes give one run, whether on one device or spread over two processes."""

import dataclasses
import sys

import numpy as np
import pytest
from flax import nnx

from clvr_jax.cli import main
from clvr_jax.data.trajectory_dataset import write_dataset
from clvr_jax.models.flux2_transformer import Flux2Transformer
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from tests.data.simulated import TWO_IMAGES, simulated
from tests.rl.pprl_toy import small_qwen3_vl
from tests.training.test_interruptions import ROOT, losses, run

CLUSTER = [sys.executable, str(ROOT / "launch" / "local_cluster.py"), "--processes", "2", "--devices", "1"]
STEPS = 4
OPTIONS = [
    *("--batch-size", "8"),
    *("--train.steps", str(STEPS), "--train.log-every", "1", "--train.learning-rate", "1e-4"),
    *("--train.compute-dtype", "float32"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "trajectories"
    write_dataset(folder, map(simulated, TWO_IMAGES))
    return folder


@pytest.fixture
def model(request, tmp_path):
    """The shipped model with fewer blocks and new weights: devices that are threads take long to agree on each."""
    return request.param(tmp_path / "model")


def small_drawer(folder):
    pipe = Flux2Pipeline.from_pretrained("shapes-tiny-sft")
    config = dataclasses.replace(pipe.transformer.config, num_layers=1, num_single_layers=2)
    transformer = Flux2Transformer(config, rngs=nnx.Rngs(0))
    Flux2Pipeline(transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.settings).save_pretrained(str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "model"), [("flux2_sft", small_drawer), ("qwen3_vl_sft", small_qwen3_vl)], indirect=["model"]
)
def test_two_processes_train_as_one_does(dataset, tmp_path, recipe, model):
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
