"""Curves of runs: which are one line, what is drawn, and what cannot be."""

import json

import numpy as np
import pytest

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_json
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.files.image_io import read_image
from clvr_jax.training.curves import curves, write_plot
from tests.commands.command_line import complaint


def make_run(folder, values, seed=0, simple=False):
    folder.mkdir()
    rows = [{"step": 10 * (n + 1), "reward": value, "kl": value / 2} for n, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    write_json(folder / "recipe.json", {"recipe": "r.py", "config": {"train": {"seed": seed}, "simple": simple}})
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        make_run(tmp_path / "pprl-0", [1.0, 2.0, 3.0]),
        make_run(tmp_path / "pprl-1", [3.0, 4.0], seed=1),  # not finished
        make_run(tmp_path / "simple-0", [0.0, 0.5, 1.0], simple=True),
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_curve(runs):
    found = curves(runs)
    assert list(found) == ["reward", "kl"]
    both, alone = found["reward"]
    assert (both.name, alone.name) == ("pprl", "simple-0")
    np.testing.assert_array_equal(both.steps, [10, 20])
    np.testing.assert_array_equal(both.values, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(alone.values, [[0, 0.5, 1]])


def test_smoothing_is_the_mean_of_what_came_before(runs):
    (line,) = curves(runs[:1], ["reward"], smooth=2)["reward"]
    np.testing.assert_allclose(line.values, [[1, 1.5, 2.5]])


def test_the_command_plots_and_tells_the_ends(runs, tmp_path, capsys):
    out = tmp_path / "plots" / "curves.png"
    assert main(["curves", *map(str, runs), "--out", str(out), "--json"]) == 0
    ends = json.loads(capsys.readouterr().out)["ends"]
    assert ends["reward"] == {
        "pprl": {"runs": 2, "step": 20, "mean": 3.0, "range": [2.0, 4.0]},
        "simple-0": {"runs": 1, "step": 30, "mean": 1.0, "range": [1.0, 1.0]},
    }
    assert len(np.unique(read_image(out).reshape(-1, 3), axis=0)) > 20
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


def test_runs_in_a_bucket_have_the_curves_of_those_on_a_disk(runs, bucket, tmp_path, capsys):
    given = [str(runs[0]), "gs://runs/a/pprl-1", "gs://runs/simple-0"]
    for run, place in zip(runs[1:], given[1:], strict=True):
        for path in run.iterdir():
            objects.write(storage_path(place) / path.name, path.read_bytes())
    ends = []
    for number, paths in enumerate((runs, given)):
        out = tmp_path / f"{number}.png"
        assert main(["curves", *map(str, paths), "--out", str(out), "--json"]) == 0
        ends.append(json.loads(capsys.readouterr().out)["ends"])
    assert ends[0] == ends[1]
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    assert main(["curves", "gs://runs/none", "--out", str(out)]) == 1
    assert "gs://runs/none: no run with metrics here (no file gs://runs/none/metrics.jsonl)" in complaint(capsys)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--metrics", "rewrad"], 2, "no run has the metric rewrad; there are reward, kl"),
        (["--smooth", "0"], 2, "--smooth must be at least 1"),
        (["--out", "curves.gif9"], 2, "curves.gif9: Format 'gif9' is not supported"),
    ],
)
def test_what_cannot_be_plotted_is_told_in_one_line(runs, capsys, monkeypatch, tmp_path, options, code, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in options else ["--out", "curves.png"]
    assert main(["curves", str(runs[0]), *out, *options]) == code
    assert message in capsys.readouterr().err
    assert main(["curves", "nothing", "--out", "curves.png"]) == 1
    assert "nothing: no run with metrics here" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ClvrError, match=r"pip install 'clvr-jax\[plots\]'"):
        write_plot(tmp_path / "curves.png", curves(runs))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000 + b"\n{}\n", r"metrics\.jsonl:1: JSON with more than 64 levels is not read"),
        (b'{"step": 1, "loss": 2}\n{"ste\n{"step": 2, "loss": 1}\n', r"metrics\.jsonl:2: not JSON"),
        (b'{"step": "x", "loss": 2}\n', r"metrics\.jsonl:1: step must be an integer of at least 0, got 'x'"),
        (b'{"step": 1, "loss": {"a": 1}}\n', r"metrics\.jsonl:1: loss must be a number, got an object"),
        (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", r"metrics\.jsonl:1: loss must be a finite number"),
        (b"\xff\n\n", r"metrics\.jsonl:1: not JSON: not UTF-8"),
    ],
)
def test_metrics_of_somebody_else_are_refused_with_their_line(tmp_path, content, said):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ClvrError, match=said):
        curves([tmp_path])


def test_a_run_that_diverges_has_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": NaN}\n')
    (line,) = curves([tmp_path])["loss"]
    np.testing.assert_array_equal(line.values, [[2.0, np.nan]])


@pytest.mark.parametrize("recipe", ['{"config": 3}', '{"config": {"train": []}}', "[1]"])
def test_a_damaged_recipe_file_is_named(tmp_path, recipe):
    run = make_run(tmp_path / "run", [1.0])
    (run / "recipe.json").write_text(recipe)
    with pytest.raises(ClvrError, match=r"recipe\.json"):
        curves([run])
