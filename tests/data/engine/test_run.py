"""Tests of whole runs, from prompts to a dataset, with Apache Beam; interrupted and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clvr_jax import cli
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.trajectories.dataset import VERIFICATION, TrajectoryDataset

ROOT = Path(__file__).parents[3]
RECIPE = "tests/data/engine/synth_recipe.py"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


def contents(directory):
    """Returns the content of the dataset without values that depend on time."""
    dataset = TrajectoryDataset(directory / "dataset")
    return [
        (dataset[number].id, dataset[number].proxies, [step.reasoning for step in dataset[number].trajectory.steps])
        for number in range(len(dataset))
    ]


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_repeats_nothing(tmp_path):
    out, log = tmp_path / "killed", tmp_path / "log"
    options = ["synth", RECIPE, "--seconds", "0.1", "--out", str(out)]
    with subprocess.Popen([sys.executable, "-m", "clvr_jax.cli", *options], cwd=ROOT) as process:
        store, deadline = OutcomeStore(out / "outcomes"), time.monotonic() + 120
        while len(store.ids()) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finished = store.ids()
    assert 3 <= len(finished) < 12
    assert not (out / "dataset").exists()
    kept = {id: store.path(id).read_bytes() for id in finished}
    assert cli.main([*options, "--log", str(log)]) == 2  # another config
    assert cli.main(options) == 0
    assert {id: store.path(id).read_bytes() for id in finished} == kept
    assert len(store.ids()) == 12
    assert cli.main(["synth", RECIPE, "--out", str(tmp_path / "straight"), "--log", str(log)]) == 0
    assert contents(out) == contents(tmp_path / "straight")
    assert sorted(log.read_text().split()) == [f"p-{number:03d}" for number in range(12)]
    assert cli.main(["synth", RECIPE, "--out", str(tmp_path / "straight"), "--log", str(log), "--count", "14"]) == 0
    assert sorted(log.read_text().split()) == [f"p-{number:03d}" for number in range(14)]


@pytest.mark.slow
def test_mistakes_are_kept_and_a_dataset_without_corrections_gives_a_warning(tmp_path, capsys):
    out, options = tmp_path / "run", ["synth", RECIPE, "--out", str(tmp_path / "run")]
    assert cli.main(options) == 0
    assert "warning" not in capsys.readouterr().err
    found = json.loads((out / "statistics.json").read_text())
    assert found["corrections"]["total"] > 0
    assert found["audit"]["wrong"] == 0  # of the targets
    dataset, examples = TrajectoryDataset(out / "dataset"), TrajectoryDataset(out / "dataset", VERIFICATION)
    assert sum(len(dataset[number].mistakes) for number in range(len(dataset))) == found["corrections"]["wrong_images"]
    assert len(examples) == found["verification"]["right"] + found["verification"]["wrong"]
    assert cli.main([*options, "--synth.no-keep-mistakes"]) == 2  # the option is part of the run's identity
    assert "synth.keep_mistakes" in capsys.readouterr().err
    assert cli.main(["synth", RECIPE, "--out", str(tmp_path / "none"), "--synth.no-keep-mistakes"]) == 0
    assert "does not learn to inspect images" in capsys.readouterr().err
    assert not TrajectoryDataset(tmp_path / "none" / "dataset").has_verification


def test_dataset_page_and_card_agree(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    out = tmp_path / "run"
    assert cli.main(["synth", RECIPE, "--out", str(out), "--sharegpt", str(tmp_path / "share"), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    found = json.loads((out / "statistics.json").read_text())
    assert outcome["trajectories"] == found["trajectories"] == len(TrajectoryDataset(out / "dataset"))
    assert 0 < found["trajectories"] < 12
    assert found["audit"]["wrong"] == 0
    headline = f"{found['trajectories']} trajectories of 12 prompts"
    assert headline in (out / "statistics.html").read_text()
    assert headline in (out / "dataset_card.md").read_text()
    assert len((tmp_path / "share" / "sharegpt.jsonl").read_text().splitlines()) == found["trajectories"]
    assert cli.main(["synth", RECIPE, "--out", str(out), "--inspect", "p-001"]) == 0
    page = out / "inspected" / "p-001" / "index.html"
    assert opened == [page.as_uri()]
    assert "<html" in page.read_text()
    assert cli.main(["synth", RECIPE, "--out", str(out), "--inspect", "99"]) == 2


def test_without_verification_wrong_images_are_kept(tmp_path):
    out = tmp_path / "run"
    assert cli.main(["synth", RECIPE, "--out", str(out), "--synth.no-verify", "--count", "20"]) == 0
    found = json.loads((out / "statistics.json").read_text())
    assert found["audit"]["wrong"] > 0


def test_failures_of_a_worker_are_one_line(tmp_path, capfd):
    recipe = tmp_path / "bad_recipe.py"
    text = (ROOT / RECIPE).read_text()
    recipe.write_text(text.replace("return make_shapes_roles(item)", 'raise ClvrError(f"{item.id}: the disk is full")'))
    recipe.write_text("from clvr_jax.errors import ClvrError\n" + recipe.read_text())
    assert cli.main(["synth", str(recipe), "--out", str(tmp_path / "run")]) == 1
    message = capfd.readouterr().err
    assert message.splitlines()[-1].endswith(": the disk is full")
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "no CONFIG and no prompts and no worker_context"),
        ("CONFIG, prompts, worker_context = 1, 2, 3", "field `synth`"),
        (
            "from tests.data.engine.synth_recipe import *\ndef prompts(config): return []",
            "no prompts to process",
        ),
    ],
)
def test_errors_of_invalid_recipes_are_one_line(tmp_path, capsys, content, message):
    (tmp_path / "r.py").write_text(content)
    assert cli.main(["synth", str(tmp_path / "r.py"), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
