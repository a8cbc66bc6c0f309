"""`clvr eval` with systems that need no model: folders, endpoints, finished runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from clvr_jax.cli import main
from clvr_jax.commands.eval.system import SystemOptions
from clvr_jax.errors import UsageError
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.language.grammar import scene_for
from clvr_jax.worlds.shapes.prompts import evaluation_prompts, write_prompts
from clvr_jax.worlds.shapes.render import render
from tests.providers.server import completion, failure, pictures, png

METADATA = evaluation_prompts("eval")[::90]


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_prompts("few.jsonl", METADATA)


def right(entry):
    image = render(scene_for(entry, np.random.default_rng(0), allow_held_out=True))
    assert check(detect(image), entry).correct
    return image


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--max-steps", "4"], "one-shot"),
        (["--candidates", "4"], "one-shot"),
        (["--mode", "open-loop", "--guidance", "2"], "one-shot"),
        (["--mode", "open-loop", "--max-steps", "3"], "not for --mode open-loop"),
        (["--mode", "best-of"], "--candidates 2 or more"),
        (["--mode", "best-of", "--candidates", "4", "--max-steps", "3"], "takes --candidates"),
        (["--endpoint", "http://x/v1", "--pictures", "p"], "two systems"),
        (["--pictures", "p", "--mode", "closed-loop"], "scores existing images"),
        (["--endpoint", "http://x/v1", "--steps", "4"], "our own models"),
        (["--endpoint", "http://x/v1", "--mode", "closed-loop"], "--controller endpoint"),
        (["--controller", "endpoint", "--mode", "closed-loop"], "--controller-model"),
        (["--endpoint", "http://x/v1", "--picture-size", "64"], "height and width"),
        (["--mode", "closed-loop", "--max-seconds", "0"], "--max-seconds"),
        (["--mode", "closed-loop", "--stop-when", "drawn", "--candidates", "2"], "verifies nothing"),
        (["--in-flight", "0"], "--in-flight"),
        (["--descriptions", "detector"], "in the loop or best-of"),
        (["--mode", "closed-loop", "--blind", "--descriptions", "detector"], "that is not blind"),
        (["--mode", "closed-loop", "--controller", "oracle", "--descriptions", "detector"], "a separate verifier"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given, said, capsys):
    assert main(["eval", "shapes", "--model", "m", "--out", "o", *given]) == 2
    assert said in capsys.readouterr().err


def test_oracle_and_detector_are_for_the_shapes_world():
    with pytest.raises(UsageError, match="clvr eval shapes"):
        SystemOptions("shapes-tiny", "closed-loop", "oracle").build()
    with pytest.raises(UsageError, match="clvr eval shapes"):
        SystemOptions("shapes-tiny", "closed-loop", descriptions="detector").build()


def test_pictures_made_elsewhere_are_scored_compared_and_scaled(tmp_path, capsys):
    folder = tmp_path / "made"
    folder.mkdir()
    lines = []
    for number, entry in enumerate(METADATA):
        image = right(entry) if number % 2 else np.zeros((64, 64, 3), np.uint8)
        (folder / f"{number}.png").write_bytes(png(image))
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": entry["prompt"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    score = ["eval", "shapes", "--pictures", "made", "--prompts", "few.jsonl", "--json"]
    assert main([*score, "--model", "Imagen", "--out", "imagen"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["summary"]["overall"]["over_pictures"]["correct"] == len(METADATA) // 2
    assert told["settings"]["model"] == "Imagen"

    assert main([*score, "--model", "Other", "--out", "other"]) == 0
    assert main(["eval", "compare", "imagen", "other", "--out", "report"]) == 0
    assert main(["eval", "scaling", "imagen", "x=other", "--out", "curves", "--json"]) == 0
    scaling = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [system["name"] for system in scaling["systems"]] == ["imagen", "x"]
    assert set(scaling["files"]) == {path.name for path in (tmp_path / "curves").iterdir()}


def test_an_endpoint_alone_and_planned_by_another(server, endpoint, tmp_path, capsys):
    by_prompt = {entry["prompt"]: entry for entry in METADATA}

    def answer(seen):
        told = seen.json
        if "images" not in seen.path:
            text = told["messages"][1]["content"]
            done = len(told["messages"]) > 2
            return completion("I see it. Unmet: nothing.<|terminate|>" if done else f"Draw {text}<|image_gen|>")
        if told["prompt"] == METADATA[0]["prompt"]:
            return failure(400, "no", code="moderation_blocked")
        return pictures(png(right(by_prompt[told["prompt"].split("\n")[0]])))

    server.script = [answer]
    url = server.url + "/v1"
    generate = ["eval", "shapes", "--model", "gpt-image-1", "--endpoint", url, "--key-variable", "LOOPBACK_KEY"]
    generate += ["--prompts", "few.jsonl", "--json", "--picture-price", "0.1", "--picture-size", "64", "64"]
    assert main([*generate, "--out", "alone"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    count = len(METADATA)
    assert summary["overall"]["over_pictures"]["correct"] == count - 1
    assert summary["cost"]["dollars"] == pytest.approx(0.1 * (count - 1))
    assert list(summary["cost"]["devices"]) == [f"gpt-image-1 ({server.url.removeprefix('http://')})"]

    planner = ["--controller", "endpoint", "--controller-endpoint", url, "--controller-model", "qwen"]
    planner += ["--controller-key-variable", "LOOPBACK_KEY", "--controller-prices", "1000", "0"]
    assert main([*generate, *planner, "--mode", "closed-loop", "--max-steps", "2", "--out", "planned"]) == 0
    cost = json.loads(capsys.readouterr().out)["summary"]["cost"]
    assert cost["outcomes"] == {"accepted": count}
    # A plan and a look, 11 tokens read and 7 written each.
    assert (cost["input_tokens_per_picture"], cost["output_tokens_per_picture"]) == (22, 14)
    assert cost["dollars"] == pytest.approx(count * (0.1 + 22 * 0.001))


def test_a_server_that_returns_paths_is_asked_for_the_bytes_of_images(server, endpoint, tmp_path, capsys):
    """Xinference and SGLang return a path on their disk unless the request names a format."""
    by_prompt = {entry["prompt"]: entry for entry in METADATA}

    def answer(seen):
        is_asked = seen.json.get("response_format") == "b64_json"
        return pictures(png(right(by_prompt[seen.json["prompt"]])) if is_asked else "/tmp/images/1.png")

    server.script = [answer]
    generate = ["eval", "shapes", "--model", "sdxl", "--endpoint", server.url + "/v1", "--prompts", "few.jsonl"]
    generate += ["--key-variable", "LOOPBACK_KEY", "--json"]
    assert main([*generate, "--out", "paths"]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clvr: ")]
    assert "perhaps a path on the server's disk; set the response format to b64_json" in said
    assert not list((tmp_path / "paths").rglob("*.png"))
    assert main([*generate, "--out", "bytes", "--picture-format", "b64_json"]) == 0
    overall = json.loads(capsys.readouterr().out)["summary"]["overall"]
    assert overall["over_pictures"]["correct"] == len(METADATA)


@pytest.mark.parametrize(
    ("nonsense", "ending"),
    [
        ("I like trains.", "unparseable"),
        ("{}", "unparseable"),
        ("Unmet: x.<|fly|>", "unparseable"),
        ("<|image_gen|><|terminate|>", "unparseable"),
        ("Unmet: nothing.<|terminate|>", "gave up"),  # although there is no image that it could have accepted
    ],
)
def test_a_controller_that_replies_nonsense_has_one_ending_and_no_score(nonsense, ending, server, endpoint, capsys):
    server.script = [lambda seen: pictures(png(right(METADATA[0]))) if "images" in seen.path else completion(nonsense)]
    url = server.url + "/v1"
    system = ["--model", "gpt-image-1", "--endpoint", url, "--key-variable", "LOOPBACK_KEY", "--mode", "closed-loop"]
    system += ["--controller", "endpoint", "--controller-endpoint", url, "--controller-model", "qwen"]
    system += ["--controller-key-variable", "LOOPBACK_KEY", "--prompts", "few.jsonl", "--limit", "1", "--json"]
    assert main(["eval", "shapes", *system, "--out", "o"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["cost"]["outcomes"] == {ending: 1}
    assert summary["overall"]["over_pictures"]["correct"] == 0
    assert not any("images" in seen.path for seen in server.seen)
    record = json.loads(Path("o/results.json").read_text())["pictures"][0]
    assert (record["correct"], record["reasons"]) == (False, [f"no image was generated ({ending})"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "give --model, or directories"),
        (["--model", "m", "--max-steps", "1"], "--max-steps must be at least 2"),
        (["--model", "m", "--modes", "best-of", "best-of"], "once"),
    ],
)
def test_scaling_says_what_it_needs(given, said, capsys):
    assert main(["eval", "scaling", "--out", "o", *given]) == 2
    assert said in capsys.readouterr().err
