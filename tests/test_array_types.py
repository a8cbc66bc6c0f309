"""The annotations of arrays in models, diffusion and RL are true of what these functions get and return."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = (
    *("flux2", "flux2_quantized", "qwen3", "qwen3_vl", "clip", "unet", "autoencoders", "attentions", "adapters"),
    *("flow", "noise_prediction", "tokens", "rl"),
    *("keys of another head_dim", "float token ids", "noise of another batch"),
)


@pytest.fixture(scope="module")
def outcomes():
    child = subprocess.run(
        [sys.executable, "-m", "tests.checked_calls"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_calls_are_named(outcomes):
    assert tuple(outcomes) == CALLS


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_arrays_are_as_annotated(outcomes, name):
    assert outcomes[name] is None
