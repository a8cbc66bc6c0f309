"""Two processes, each with one device of a mesh, generate together what one process generates."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clvr_jax.training.distributed import virtual_devices
from launch.local_cluster import free_port
from tests.pipelines.processes_worker import results

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_generate_what_one_generates(folder, folders, small_qwen3_vl, tmp_path):
    models = [str(folder), str(folders(True, "euler")), str(small_qwen3_vl)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **virtual_devices(1)}
    command = [sys.executable, "-m", "tests.pipelines.processes_worker", f"127.0.0.1:{free_port()}"]
    started = [
        subprocess.Popen(
            [*command, str(process), str(tmp_path), *models],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    expected, found = results(*models), np.load(tmp_path / "results.npz")
    assert found["text"] == expected["text"]
    for name in ("images", "latents", "logprobs"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    for process in range(2):
        errors = (tmp_path / f"errors{process}").read_text().splitlines()
        assert errors[0] == "only process 1 fails"
        assert errors[1].startswith("process 1 has other prompts than process 0")
        assert errors[2] == "mesh: process 1 has none of the 1 devices; every process needs one"
