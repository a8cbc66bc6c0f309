"""Every command with an output directory refuses one that another process writes to, and takes over a stale lock."""

import json
import os

import numpy as np
import pytest

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.locks import LOCK, locked, locked_output, new_directory
from clvr_jax.training.recipes import load_recipe, train
from clvr_jax.worlds.shapes.prompts import evaluation_prompts, write_prompts
from tests.commands.command_line import RECIPE
from tests.providers.server import png

METADATA = evaluation_prompts("eval")[::200]
BENCHMARK = ["--prompts", "few.jsonl", "--model", "m", "--pictures", "made"]
COMMANDS = {
    "shapes": ["eval", "shapes", *BENCHMARK, "--out", "out"],
    "geneval": ["eval", "geneval", *BENCHMARK, "--samples", "1", "--out", "out"],
    "a share": ["eval", "geneval", *BENCHMARK, "--samples", "1", "--share", "0/2", "--out", "out"],
    "verifier": ["eval", "verifier", "--count", "1", "--out", "out"],
    "planning": ["eval", "planning", "--limit", "1", "--out", "out"],
    "steps": ["eval", "steps", "--states", "1", "--noises", "1", "--out", "out"],
    "compare": ["eval", "compare", "x=done", "y=other", "--out", "out"],
    "scaling": ["eval", "scaling", "x=done", "--out", "out"],
    "synth": ["synth", "shapes_synth", "--count", "2", "--out", "out"],
}


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_prompts("few.jsonl", METADATA)
    (tmp_path / "made").mkdir()
    lines = [{"file_name": f"{number}.png", "prompt": entry["prompt"]} for number, entry in enumerate(METADATA)]
    for line in lines:
        (tmp_path / "made" / line["file_name"]).write_bytes(png(np.zeros((64, 64, 3), np.uint8)))
    (tmp_path / "made" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def _done(capsys):
    for name in ("done", "other"):
        assert main(["eval", "shapes", *BENCHMARK, "--model", name, "--out", name]) == 0
    capsys.readouterr()


def fail(directory, error):
    directory.mkdir(exist_ok=True)
    (directory / "half").write_text("")
    raise error


def content(directory):
    return {path.name for path in directory.iterdir()}


@pytest.mark.usefixtures("_done")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_directory_in_use_is_refused_in_one_line_and_stays_as_it_is(name, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        assert main(COMMANDS[name]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clvr: ")]
        assert f"out: process {os.getpid()} " in line
        assert "has been writing to it since" in line
        assert content(out) == {LOCK}


WITHOUT_LOCK = {
    "generate": ["generate", "a red circle", "--model", "shapes-tiny", "--out", "out"],
    "train": ["train", "recipe.py", "--out", "out"],
}


@pytest.mark.usefixtures("_done")
@pytest.mark.parametrize("name", COMMANDS | WITHOUT_LOCK)
def test_a_url_is_no_directory_and_none_is_made(name, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(RECIPE)
    before = content(tmp_path)
    assert main([*(COMMANDS | WITHOUT_LOCK)[name][:-1], "s3://bucket/out"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clvr: ")]
    assert "s3://bucket/out: a URL" in line
    assert content(tmp_path) == before


def test_a_stale_lock_is_taken_over_and_none_is_left(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (LOCK, f"{LOCK}-0-of-2"):
        (out / name).write_text(json.dumps({"process": 2**22 + 1, "host": os.uname().nodename}))
    assert main(COMMANDS["shapes"]) == 0
    assert "results.json" in content(out)
    assert not [name for name in content(out) if name.startswith(LOCK)]


def test_shares_run_side_by_side_and_nobody_else_beside_them(tmp_path):
    with locked_output(tmp_path / "out", (0, 3)), locked_output(tmp_path / "out", (2, 3)):
        for share in ((2, 3), (0, 2), (0, 1)):
            with pytest.raises(ClvrError, match=f"out: process {os.getpid()}"), locked_output(tmp_path / "out", share):
                pass
        assert content(tmp_path / "out") == {f"{LOCK}-0-of-3", f"{LOCK}-2-of-3"}
    assert not (tmp_path / "out").exists()


def test_the_export_of_a_run_appears_when_it_is_complete(tmp_path, capsys):
    (tmp_path / "vector.py").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "vector.py")
    train(recipe, recipe.config, tmp_path / "run")
    export, temporary = ["convert", "run", "exported", "--to", "torch"], tmp_path / ".exported.export"
    with new_directory(tmp_path / "exported", "export") as folder:
        assert folder == temporary / "exported"
        folder.mkdir()
        assert main(export) == 1
        assert f"exported: process {os.getpid()} " in capsys.readouterr().err
    (tmp_path / "exported").rmdir()
    temporary.mkdir()
    (temporary / "half").write_text("of a killed process")
    (temporary / "transformer").mkdir()
    assert main(export) == 0
    assert content(tmp_path / "exported") == content(tmp_path / "run" / "export")
    assert not temporary.exists()
    assert main(export) == 2  # it exists


def test_an_export_that_fails_leaves_nothing(tmp_path):
    for error in (ClvrError("no room"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_directory(tmp_path / "exported", "export") as folder:
            fail(folder, error)
    (tmp_path / "exported").mkdir()
    with pytest.raises(UsageError, match="exists already"), new_directory(tmp_path / "exported", "export"):
        pass
    (tmp_path / "exported").rmdir()
    assert content(tmp_path) == {"made", "few.jsonl"}
