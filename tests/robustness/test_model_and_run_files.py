"""Configuration files of models and files of training runs that are malformed: one line that names the file.

`make test` runs every third input, `make test-robustness` all of them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clvr_jax.cli import main
from clvr_jax.data.engine.intake import read_prompts
from clvr_jax.data.qwen3_vl_images import load_processor
from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json
from clvr_jax.pipelines.folder import load_schedule
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.pipelines.sdxl_folder import read_scheduler
from clvr_jax.training.curves import curves
from tests.robustness.corpus import Case, json_texts, json_values

EVERY = 1 if os.environ.get("ALL_INPUTS") else 3
TINY = SHIPPED / "shapes-tiny"
CONTROLLER = TINY / "controller"
SDXL = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
METRICS = {"step": 10, "loss": 0.5, "seconds_per_step": 0.1}
RECIPE = {"recipe": "r.py", "config": {"train": {"seed": 0, "steps": 5}}}
PROMPT = {"prompt": "a red circle", "id": "a", "metadata": {"tag": "x"}}


def _controller(root: Path, case: Case) -> None:
    """Converts a Qwen3-VL whose config.json is malformed."""
    root.mkdir()
    for path in CONTROLLER.iterdir():
        if path.name != "config.json":
            (root / path.name).symlink_to(path)
    case.write(root / "config.json")
    out = root.parent / "out"
    assert main(["convert", str(root), str(out), "--to", "jax", "--dry-run"]) in (0, 1, 2)
    assert not out.exists()


def _processor(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "preprocessor_config.json")
    load_processor(root)


def _flux2_scheduler(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "scheduler_config.json")
    load_schedule(root)


def _sdxl_scheduler(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "scheduler_config.json")
    read_scheduler(read_json(root / "scheduler_config.json"))


def _metrics(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "metrics.jsonl")
    curves([root])


def _recipe(root: Path, case: Case) -> None:
    root.mkdir()
    (root / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    case.write(root / "recipe.json")
    curves([root])


def _prompts(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "prompts.jsonl")
    list(read_prompts(root / "prompts.jsonl"))


READERS: dict[str, tuple[Callable[[Path, Case], None], Any]] = {
    "config.json of Qwen3-VL": (_controller, read_json(CONTROLLER / "config.json")),
    "preprocessor_config.json": (_processor, read_json(CONTROLLER / "preprocessor_config.json")),
    "scheduler_config.json of FLUX.2": (_flux2_scheduler, read_json(TINY / "scheduler" / "scheduler_config.json")),
    "scheduler_config.json of SDXL": (_sdxl_scheduler, SDXL),
    "metrics.jsonl": (_metrics, METRICS),
    "recipe.json of a run": (_recipe, RECIPE),
    "prompts.jsonl": (_prompts, PROMPT),
}


def _cases() -> Iterator[tuple[str, Case]]:
    for name, (_, valid) in READERS.items():
        for case in (*json_texts(json.dumps(valid).encode()), *json_values(valid, 36, seed=len(name))):
            yield name, case


CASES = [pytest.param(*each, id=f"{each[0]}-{number}") for number, each in enumerate(_cases()) if number % EVERY == 0]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_one_line_that_names_the_file(name, case, tmp_path, capsys):
    try:
        READERS[name][0](tmp_path / "input", case)
    except ClvrError as error:
        message = str(error)
    else:  # the command's own line, or nothing where a changed value is as good as the other
        message = capsys.readouterr().err
        assert "--debug shows where" not in message
        message = next((line for line in message.splitlines() if line.startswith("clvr: ")), "")
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 2000


@pytest.mark.parametrize("name", READERS)
def test_what_is_well_formed_is_read(name, tmp_path, capsys):
    read, valid = READERS[name]
    read(tmp_path / "input", Case("valid", lambda path: path.write_text(json.dumps(valid))))
    assert "clvr: " not in capsys.readouterr().err


def test_a_run_that_is_exported_names_its_damaged_recipe_file(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for case in (*json_texts(json.dumps(RECIPE).encode()), *json_values(RECIPE, 12, seed=1)):
        path = run / "recipe.json"
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        case.write(path)
        assert main(["convert", str(run), str(tmp_path / "out"), "--to", "torch"]) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("clvr: "), (case.name, said)
        assert len(said.splitlines()) == 1, (case.name, said)
        assert "--debug shows where" not in said, (case.name, said)
        assert list(tmp_path.iterdir()) == [run]
