"""A recipe and a model directory that load in no time."""

from pathlib import Path

import pytest

from tests.commands.command_line import RECIPE


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "vector.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that looks like a model of the shapes world, without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}')
    (folder / "clvr.json").write_text('{"flux2": {"world": "shapes"}}')
    return folder
