"""Fixtures that the tests of RL share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with twelve trajectories; tests only read it."""
    from tests.rl.pprl_toy import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "trajectories")
