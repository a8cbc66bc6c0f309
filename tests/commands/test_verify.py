"""`clvr verify`: what it refuses and how, and what it reports."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.cli import main, parse
from clvr_jax.commands.generation.verifying import Verify
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ChatResponse, ProviderError, Token, Usage
from clvr_jax.pipelines.qwen3_vl import Verifier
from clvr_jax.reasoning.verification.model_verifier import ModelVerifier
from tests.providers.server import KEY, LoopbackServer, completion, failure

PROMPT = "a red circle and a blue star"


class ScriptedModel:
    """Sees the first pixel of an image: a red one shows a red circle, all others nothing."""

    name = "scripted"

    def __init__(self, with_probabilities=True):
        self._with_probabilities = with_probabilities
        self.images = []
        self.clause_probability = 1.0
        self.place = ""

    def chat_all(self, questions):
        return [self._answer(question) for question in questions]

    def _answer(self, question):
        content = question.messages[-1]["content"]
        if question.images:
            (image,) = question.images
            self.images.append(np.asarray(image))
            sees_red = image[0, 0].tolist() == [255, 0, 0]
            if content[-1]["type"] == "image":
                seen = f"I see red circle{self.place}." if sees_red else "I see nothing."
                tokens = (Token(seen, math.log(self.clause_probability)),) if self._with_probabilities else None
                return ChatResponse(seen, Usage(calls=1), tokens)
            content = f"{'I see red circle' if sees_red else 'nothing'}\n{content[-1]['text']}"
        elif content.startswith("Required of:"):
            items = [] if "hello" in content else re.findall(r"\b(?:red|blue|green) \w+", content)
            return ChatResponse(f"Required: {'; '.join(items) or 'nothing'}.", Usage(calls=1))
        description, required = content.split("\nRequired: ")
        if "vague" in required:
            return ChatResponse("Who knows.")
        is_met = required.rstrip(".") in description
        end = " yes" if is_met else " no"
        other = " no" if is_met else " yes"
        evidence = description.removeprefix("I see ").rstrip(".") + "."
        tokens = (Token(evidence, 0.0), Token(end, math.log(0.9), {end: math.log(0.9), other: math.log(0.1)}))
        return ChatResponse(evidence + end, Usage(calls=1), tokens if self._with_probabilities else None)


@pytest.fixture(autouse=True)
def _directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def scripted(monkeypatch):
    """The model behind the command; `modes`: those that were asked for."""
    model = ScriptedModel()
    model.modes = []

    def load(name, mode=None):
        model.modes.append(mode)
        return ModelVerifier(model, mode or "describe", is_instructed=False)

    monkeypatch.setattr(Verifier, "from_pretrained", load)
    monkeypatch.setattr("clvr_jax.commands.generation.verifying.prepare_jax", lambda: None)
    return model


@pytest.fixture
def unloadable(monkeypatch):
    def load(name, mode=None):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Verifier, "from_pretrained", load)


def save(name, color=(255, 0, 0), size=(64, 64), **options):
    Image.new("RGB", size, color).save(name, **options)
    return name


def verify(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = main(["verify", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys, *arguments):
    code, out, _ = verify(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


def complaint(capsys, *arguments):
    code, out, err = verify(capsys, *arguments)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("clvr: ")
    return code, line


def test_the_example_is_understood():
    command = parse(shlex.split(Verify.EXAMPLE)[1:])
    assert type(command) is Verify
    assert command.images == (Path("first.png"), Path("second.png"))


def test_every_option_has_a_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    lines = capsys.readouterr().out
    text = " ".join(lines.replace("│", " ").split())
    for option in ("--model", "--mode", "--requirement", "--url", "--endpoint-model", "--key-variable", "--json"):
        assert re.search(rf"{option} .*?\.", text), option


def test_requirement_by_requirement_for_people(scripted, capsys):
    code, out, err = verify(capsys, PROMPT, save("red.png"), save("black.png", (0, 0, 0)))
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "red.png accepted: no, 1 of 2 requirements unmet" in lines
    assert "met 0.900 red circle red circle" in lines
    assert "unmet 0.100 blue star red circle" in lines
    assert "description: I see red circle." in lines
    assert "black.png accepted: no, 2 of 2 requirements unmet" in lines
    assert lines[-1] == "verified by scripted, describe"
    _, out, _ = verify(capsys, "a red circle", "red.png")
    assert "red.png  accepted: yes" in out


def test_a_requirement_that_rests_on_an_uncertain_description_is_a_doubt(scripted, capsys):
    note = "Doubt: described as met, but the description is not sure enough to count."
    scripted.place = " left"
    _, out, _ = verify(capsys, "a red circle", save("red.png"))
    assert note not in out
    scripted.clause_probability = 0.45
    _, out, _ = verify(capsys, "a red circle", "red.png")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "red.png accepted: no, 1 of 1 requirements unmet" in lines
    assert "doubt 0.432 red circle red circle left" in lines
    assert note in lines


def test_the_same_as_json(scripted, capsys):
    data = report(capsys, PROMPT, save("red.png"))
    assert (data["prompt"], data["verifier"], data["requirements"]) == (PROMPT, "scripted, describe", "derived")
    (image,) = data["images"]
    assert (image["image"], image["height"], image["width"]) == ("red.png", 64, 64)
    assert (image["accepted"], image["unmet"], image["note"]) == (False, ["blue star"], None)
    assert (image["description"], image["mode"]) == ("I see red circle.", "describe")
    assert image["requirements"] == [
        {"text": "red circle", "met": True, "probability": pytest.approx(0.9), "evidence": "red circle", "doubt": ""},
        {"text": "blue star", "met": False, "probability": pytest.approx(0.1), "evidence": "red circle", "doubt": ""},
    ]
    assert image["probability"] == pytest.approx(0.1)
    assert data["usage"]["calls"] == 4


def test_a_mode_can_be_chosen(scripted, capsys):
    data = report(capsys, "a red circle", save("red.png"), "--mode", "ask")
    assert scripted.modes == ["ask"]
    assert (data["verifier"], data["images"][0]["accepted"]) == ("scripted, ask", True)
    assert data["images"][0]["description"] == ""


def test_requirements_can_be_given(scripted, capsys):
    data = report(capsys, PROMPT, save("red.png"), "--requirement", " red  circle. ", "vague")
    assert data["requirements"] == "given"
    first, second = data["images"][0]["requirements"]
    assert (first["text"], first["met"]) == ("red circle", True)
    assert (second["met"], second["probability"]) == (None, None)
    assert "Who knows" in second["evidence"]
    _, out, _ = verify(capsys, PROMPT, "red.png", "--requirement", "vague")
    assert "no answer  no probability  vague" in out


def test_a_prompt_that_asks_for_nothing_is_neither_accepted_nor_rejected(scripted, capsys):
    data = report(capsys, "hello", save("red.png"))
    assert data["images"][0]["accepted"] is None
    assert "nothing that can be checked" in data["images"][0]["note"]
    code, out, _ = verify(capsys, "hello", "red.png")
    assert code == 0
    assert "accepted: nothing to check. The prompt asks for nothing that can be checked in an image." in " ".join(
        out.split()
    )


def test_missing_probabilities_are_stated(scripted, capsys):
    scripted._with_probabilities = False
    _, out, _ = verify(capsys, "a red circle", save("red.png"))
    assert "met  no probability  red circle" in out
    assert "No probabilities: the model gives no probabilities of its tokens." in out
    assert report(capsys, "a red circle", "red.png")["images"][0]["probability"] is None


def test_what_models_say_does_not_reach_the_terminal_as_control_characters(scripted, capsys):
    _, out, _ = verify(capsys, "[red]x[/] a red circle", save("red.png"), "--requirement", "\x1b[31m[bold]vague")
    assert "\x1b" not in out
    assert "[bold]vague" in out


def test_failures_of_a_model_exit_with_1(scripted, capsys, monkeypatch):
    def fail(questions):
        raise ProviderError("scripted: no memory", "down")

    monkeypatch.setattr(scripted, "chat_all", fail)
    assert complaint(capsys, PROMPT, save("red.png")) == (1, "clvr: scripted: no memory")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "PROMPT"),
        ([PROMPT], "IMAGE"),
        ([PROMPT, "red.png", "--mode", "guess"], "guess"),
        ([PROMPT, "red.png", "--requirement", " . "], "--requirement"),
        ([PROMPT, "red.png", "--url", "http://localhost:8000/v1"], "--endpoint-model"),
        ([PROMPT, "red.png", "--endpoint-model", "m"], "--url"),
        ([PROMPT, "red.png", "--prices", "1", "2"], "--url"),
        ([PROMPT, "red.png", "--url", "nowhere", "--endpoint-model", "m"], "base_url"),
        ([PROMPT, "red.png", "--url", "http://h/v1", "--endpoint-model", "m", "--model", "x"], "--model and --url"),
        (["a \udcff circle", "red.png"], "UTF-8"),
    ],
)
def test_bad_usage_exits_with_2(arguments, said, unloadable, capsys):
    save("red.png")
    code, line = complaint(capsys, *arguments)
    assert code == 2
    assert said in line


def test_bad_images_fail_in_one_line_before_a_model_is_loaded(unloadable, capsys):
    Path("words.png").write_text("words")
    Path("directory.png").mkdir()
    Image.new("RGB", (64, 64)).save("a.png", format="GIF")
    Image.new("RGB", (1, 300)).save("long.png")
    save("red.png")
    Path("cut.png").write_bytes(Path("red.png").read_bytes()[:60])
    for name, said in [
        ("missing.png", "no such image"),
        ("words.png", "not a readable image"),
        ("directory.png", "not a file"),
        ("a.png", "PNG, JPEG or WebP"),
        ("cut.png", "not a readable image"),
        ("long.png", "too long"),
    ]:
        code, line = complaint(capsys, PROMPT, "red.png", name)
        assert code == 1
        assert said in line
        assert name in line


@pytest.mark.parametrize(("model", "said"), [("shapes-huge", "shapes-tiny"), ("empty", "config.json is missing")])
def test_unknown_models_fail_in_one_line(model, said, capsys):
    Path("empty").mkdir()
    code, line = complaint(capsys, PROMPT, save("red.png"), "--model", model)
    assert code == 1
    assert model in line
    assert said in line


def test_empty_prompts_fail_in_one_line(unloadable, capsys):
    code, line = complaint(capsys, " ", save("red.png"))
    assert (code, "empty" in line) == (1, True)


def test_images_of_another_size_are_named_once_and_checked_all_the_same(scripted, capsys):
    for name, size in [("a.png", (64, 64)), ("b.png", (128, 128)), ("c.png", (128, 128)), ("d.png", (200, 100))]:
        save(name, size=size)
    code, out, err = verify(capsys, "a red circle", "a.png", "b.png", "c.png", "d.png")
    assert code == 0
    assert out.count("accepted: yes") == 4
    assert err.splitlines() == [
        "warning: b.png and 1 more: 128 x 128 pixels, resized to 64 x 64 for shapes-tiny",
        "warning: d.png: 200 x 100 pixels, resized to 80 x 32 for shapes-tiny, which was trained on images of "
        "64 x 64 only; do not rely on the result",
    ]


def test_models_for_any_size_are_given_any_size_without_a_word(scripted, capsys, tmp_path):
    directory = tmp_path / "big"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (directory / "preprocessor_config.json").write_text("{}")
    code, _, err = verify(capsys, "a red dragon", save("a.png", size=(70, 50)), "--model", str(directory))
    assert (code, err) == (0, "")


def test_words_that_a_small_model_never_saw_are_a_warning(scripted, capsys):
    _, _, err = verify(capsys, "a red dragon", save("a.png"))
    assert err == "warning: shapes-tiny never saw: dragon\n"


def test_images_reach_the_model_upright_and_on_white(scripted, capsys):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save("clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.new("RGB", (64, 64))
    rotated.paste((255, 0, 0), (0, 32, 32, 64))  # upright it is at the top left
    rotated.save("rotated.png", exif=exif)
    data = report(capsys, "a red circle", "clear.png", "rotated.png")
    assert [each["accepted"] for each in data["images"]] == [False, True]
    assert (scripted.images[0] == 255).all()


# --- an endpoint as the verifier --------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = LoopbackServer()
    yield running
    running.close()


def answer(seen):
    """Lists two requirements; finds the red one met with probability 0.8, and says no to the other."""
    content = seen.json["messages"][-1]["content"]
    if isinstance(content, str):
        return completion("Required: red circle; blue star.")
    is_red = "red circle" in content[1]["text"]
    reply = completion("It is red. yes" if is_red else "None. no")
    texts = ["It is red.", " yes", " no"] if is_red else ["None.", " no", " yes"]
    top = [{"token": texts[1], "logprob": math.log(0.8)}, {"token": texts[2], "logprob": math.log(0.2)}]
    if seen.json.get("logprobs"):
        entries = [{"token": texts[0], "logprob": -0.1}, {**top[0], "top_logprobs": top}]
        reply.content["choices"][0]["logprobs"] = {"content": entries}
    return reply


def test_an_endpoint_verifies_with_probabilities(server, capsys):
    server.script = [answer]
    arguments = ["--url", f"{server.url}/v1", "--endpoint-model", "tiny", "--key-variable", "LOOPBACK_KEY"]
    data = report(capsys, PROMPT, save("a.png", size=(70, 50)), *arguments, "--prices", "1", "2")
    (image,) = data["images"]
    assert [(each["text"], each["met"]) for each in image["requirements"]] == [
        ("red circle", True),
        ("blue star", False),
    ]
    assert [each["probability"] for each in image["requirements"]] == [pytest.approx(0.8), pytest.approx(0.2)]
    assert image["requirements"][0]["evidence"] == "It is red"
    assert image["mode"] == "ask"
    assert data["verifier"].startswith("tiny (127.0.0.1:")
    assert (data["usage"]["calls"], data["usage"]["dollars"]) == (3, pytest.approx(3 * (11 + 2 * 7) * 1e-6))
    assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
    assert {seen.json.get("top_logprobs") for seen in server.seen} == {None, 5}


def test_an_endpoint_without_probabilities(server, capsys):
    def without(seen):
        if "temperature" in seen.json:
            return failure(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        reply = answer(seen)
        reply.content["choices"][0].pop("logprobs", None)
        return reply

    server.script = [without]
    arguments = ["--url", f"{server.url}/v1", "--endpoint-model", "tiny", "--key-variable", ""]
    _, out, _ = verify(capsys, PROMPT, save("a.png"), *arguments)
    assert "met    no probability  red circle" in out
    assert "No probabilities: the model gives no probabilities of its tokens." in out
    assert "Changes to requests that the server required: temperature left out" in " ".join(out.split())


def test_an_endpoint_whose_key_is_missing_fails_in_one_line(monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, line = complaint(capsys, PROMPT, save("a.png"), "--url", "http://h/v1", "--endpoint-model", "tiny")
    assert (code, "OPENAI_API_KEY" in line) == (1, True)


def test_the_verifier_is_a_public_name():
    import clvr_jax

    assert clvr_jax.Verifier is Verifier
    assert "Verifier" in clvr_jax.__all__
    with pytest.raises(ClvrError, match="no such model"):
        clvr_jax.Verifier.from_pretrained("shapes-huge")
