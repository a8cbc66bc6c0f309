"""`clvr eval geneval` and its kin, as a person calls them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.files.atomic_io import read_json
from tests.evaluation.benchmarks.samples import GENEVAL, IMAGINE, write_lines
from tests.providers.server import completion

GOOD = "Fantasy Fulfillment: 8\nIdentity Preservation: 9\nAesthetic Quality: 7"


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prompts(tmp_path):
    """GenEval's prompts twenty times over, and ImagineBench's."""
    write_lines(tmp_path / "geneval.jsonl", [{**entry, "prompt": f"{entry['prompt']} {n}"} for n in range(20)
                                             for entry in GENEVAL])  # fmt: skip
    write_lines(tmp_path / "imagine.jsonl", IMAGINE)


@pytest.fixture
def pictures(tmp_path, prompts):
    """A folder of pictures for all of these prompts."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    entries = []
    for name in ("geneval.jsonl", "imagine.jsonl"):
        for line in (tmp_path / name).read_text().splitlines():
            entry = json.loads(line)
            file = f"{len(entries)}.png"
            Image.fromarray(np.full((4, 4, 3), len(entries), np.uint8)).save(folder / file)
            entries.append({"file_name": file, "prompt": entry.get("prompt") or entry["instruction"]})
    write_lines(folder / "metadata.jsonl", entries)
    return ["--model", "elsewhere", "--pictures", str(folder)]


def complaint(capsys):
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("clvr: ")]
    return line


def test_a_short_geneval_run_makes_the_official_layout(pictures, capsys):
    run = [
        "eval",
        "geneval",
        "--prompts",
        "geneval.jsonl",
        "--limit",
        "20",
        "--samples",
        "1",
        "--out",
        "out",
        *pictures,
    ]
    assert main(run) == 0
    assert "not scored; score with --detector DIR --clip DIR" in capsys.readouterr().out
    folders = sorted(name for name in os.listdir("out") if name.isdigit())
    assert folders == [f"{number:05d}" for number in range(20)]
    for name in folders:
        assert read_json(Path(f"out/{name}/metadata.jsonl"))["tag"] in {entry["tag"] for entry in GENEVAL}
        assert os.listdir(f"out/{name}/samples") == ["0000.png"]


def test_draw_judge_and_judge_again(server, pictures, capsys):
    server.script = [completion(GOOD)]
    judge = ["--judge", "tiny", "--judge-url", server.url + "/v1", "--judge-key-variable", "LOOPBACK_KEY"]
    run = ["eval", "imaginebench", "--prompts", "imagine.jsonl", "--out", "out", *pictures]
    assert main([*run, *judge]) == 0
    captured = capsys.readouterr()
    assert "7.800" in captured.out
    assert "judged by tiny" in captured.out
    assert main(["eval", "imaginebench", "--out", "out", "--score-only", "--rules", "official", *judge, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["benchmark"], len(results["faults"])) == ("imaginebench-official", 3)
    assert len(server.seen) == 4  # the same replies, read by other rules
    elsewhere = ["eval", "imaginebench", "--images", "out/images", "--prompts", "imagine.jsonl", "--out", "again"]
    assert main([*elsewhere, *judge, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["overall"]["score"] == pytest.approx(7.8)
    assert len(server.seen) == 8  # its own folder, its own replies


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["geneval"], "--model is missing"),
        (["geneval", "--score-only"], "the scorer is missing; give --detector DIR --clip DIR"),
        (["geneval", "--model", "m", "--detector", "d"], "give both"),
        (["genevalpp", "--score-only"], "the scorer is missing; give --judge MODEL"),
        (["genevalpp", "--score-only", "--judge", "j", "--limit", "3"], "leave --images, --prompts"),
        (["genevalpp", "--images", "i", "--judge", "j", "--model", "m"], "leave --model and its options out"),
        (["genevalpp", "--model", "m", "--judge-url", "http://x"], "--judge is missing"),
        (["genevalpp", "--model", "m", "--share", "2/2"], "K below N"),
        (["genevalpp", "--model", "m", "--judge-prices", "1"], "--judge-prices"),
        (["wise", "--model", "m"], "--edition"),
        (["dpg", "--model", "shapes-tiny", "--samples", "2", "--prompts", "p"], "grid of 4"),
        (["prism", "--model", "shapes-tiny"], "captions/en"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert main(["eval", *arguments, "--out", "out"]) == 2
    assert said in complaint(capsys)
    assert not os.path.exists("out")


def test_what_was_not_drawn_cannot_be_scored(capsys):
    judge = ["--judge", "j", "--judge-url", "http://127.0.0.1:9/v1", "--judge-key-variable", ""]
    assert main(["eval", "genevalpp", "--out", "out", "--score-only", *judge]) == 1
    assert "benchmark.json: no such file" in complaint(capsys)


def test_who_scores_is_checked_before_anything_is_drawn(pictures, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "sdxl").mkdir()
    (tmp_path / "sdxl" / "config.json").write_text('{"model_type": "unet"}')
    imagine = ["eval", "imaginebench", "--prompts", "imagine.jsonl", "--out", "out", *pictures]
    geneval = ["eval", "geneval", "--prompts", "geneval.jsonl", "--out", "out", *pictures]
    for command, said in [
        ([*imagine, "--judge", "tiny", "--judge-url", "http://127.0.0.1:9/v1"], "OPENAI_API_KEY is not set"),
        ([*imagine, "--judge", "sdxl"], "has a unet model"),
        ([*imagine, "--judge", "nowhere"], "no such directory"),
        ([*geneval, "--detector", "sdxl", "--clip", "sdxl"], "has a unet model, GenEval's scorer needs mask2former"),
    ]:
        assert main(command) == 1
        assert said in complaint(capsys)
        assert not os.path.exists("out")
