"""scripts/average_weights.py averages what fits, and refuses the rest."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

SCRIPT = Path(__file__).parents[1] / "scripts" / "average_weights.py"


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("average_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def model(directory, value, shape=(2, 3)):
    directory.mkdir()
    save_file({"w": np.full(shape, value, np.float16)}, directory / "model.safetensors")
    (directory / "config.json").write_text(str(value))
    return str(directory)


def test_the_average_has_the_first_models_files(main, tmp_path):
    first, second = model(tmp_path / "a", 1.0), model(tmp_path / "b", 3.0)
    assert main([f"{first}:0.25", f"{second}:0.75", "--out", str(tmp_path / "out")]) == 0
    averaged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert averaged.dtype == np.float16
    np.testing.assert_array_equal(averaged, np.full((2, 3), 2.5))
    assert (tmp_path / "out" / "config.json").read_text() == "1.0"


def test_weights_that_do_not_add_up_and_other_shapes_are_refused(main, tmp_path, capsys):
    first, second = model(tmp_path / "a", 1.0), model(tmp_path / "b", 3.0, (3, 2))
    out = ["--out", str(tmp_path / "out")]
    assert main([f"{first}:0.5", *out]) == 2
    assert main([f"{first}:half", *out]) == 2
    assert main([f"{first}:0.5", f"{second}:0.5", *out]) == 1
    assert main([f"{first}:0.5", f"{tmp_path / 'none'}:0.5", *out]) == 1
    assert main([f"{first}:1", "--out", f"{first}/average"]) == 2
    assert main([f"{first}:1", "--out", "gs://bucket/average"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 6
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
