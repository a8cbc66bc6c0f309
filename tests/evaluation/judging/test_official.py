"""The prompt of a benchmark's own script: fetched, checked, parsed, not run, and sent to the judge as it is there."""

from typing import ClassVar

import pytest

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.benchmarks.dpg import DPG
from clvr_jax.evaluation.benchmarks.geneval2 import GenEval2
from clvr_jax.evaluation.benchmarks.genevalpp import GenEvalPP
from clvr_jax.evaluation.benchmarks.imaginebench import ImagineBench
from clvr_jax.evaluation.benchmarks.prism import Prism
from clvr_jax.evaluation.benchmarks.wise import WiseLegacy, WiseVerified
from clvr_jax.evaluation.harness.images import generate_images, load_generated
from clvr_jax.evaluation.harness.scoring import score_images
from clvr_jax.evaluation.harness.sources import Remote, Source, blob_id
from clvr_jax.evaluation.judging.judges import endpoint_judge
from clvr_jax.evaluation.judging.official import OfficialPrompt
from clvr_jax.evaluation.judging.scorer import JudgeScorer, official_prompt
from tests.evaluation.benchmarks.samples import IMAGINE, ColorGenerator, write_lines
from tests.providers.server import Reply, completion

GOOD = "Fantasy Fulfillment: 8\nIdentity Preservation: 9\nAesthetic Quality: 7"
MESSAGES = """
import a_package_that_is_absent

raise SystemExit("it was run")

def build_messages(prompt_data, image_base64):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You are strict."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f"PROMPT: {prompt_data['instruction']} NOTE: {prompt_data['note']}"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
        ]},
    ]
"""
FORMAT = "def soft(image):\n    for question in image:\n        ask('{} In one word.'.format(question), image)\n"


@pytest.fixture
def script(tmp_path, monkeypatch, server):
    """Makes a prompt from the text of a script, which a server has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(text, function):
        remote = Remote(f"{server.url}/eval.py", blob_id(text.encode()))
        server.script = [Reply(text.encode())]
        return OfficialPrompt(Source((remote,), license="MIT"), function, max_tokens=77)

    return make


def test_a_prompt_is_read_from_the_messages_of_a_script_that_is_not_run(script):
    names = {"prompt_data": {"instruction": "a {dog}", "note": "it flies"}}
    wording = script(MESSAGES, "build_messages").fetch("toy").wording(names)
    assert wording.system == "You are strict."
    assert wording.text == "PROMPT: a {dog} NOTE: it flies"
    assert not wording.image_first


def test_a_prompt_is_read_from_a_text_that_a_script_formats(script):
    wording = script(FORMAT, "soft").fetch("toy").wording({"question": "Is {0} red?"})
    assert (wording.system, wording.text, wording.image_first) == ("", "Is {0} red? In one word.", True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other():\n    pass\n", "has no function build_messages"),
        ("def build_messages(:\n", "cannot be parsed"),
        ("def build_messages():\n    return None\n", "neither returns messages nor formats a text"),
        ("def build_messages():\n    return [open('x')]\n", "line 2 is not a text"),
        ("def build_messages():\n    return ['a']\n", "messages must be a list of objects"),
        ("def build_messages():\n    return [{'role': 'user', 'content': []}]\n", "must have one text and one image"),
        ("def build_messages():\n    return [{'role': 'user'}]\n", "the prompt cannot be read"),
        (MESSAGES.replace("note", "absent"), "the prompt cannot be read"),
        (MESSAGES.replace('"system"', '"assistant"'), "must be a system prompt, if any, and a question"),
    ],
)
def test_another_script_is_refused_in_one_line(text, said, script):
    with pytest.raises(ClvrError, match=said) as caught:
        script(text, "build_messages").fetch("toy").wording({"prompt_data": IMAGINE[0]})
    assert "\n" not in str(caught.value)


def test_a_script_with_another_content_is_refused(script, server):
    prompt = script(MESSAGES, "build_messages")
    server.script = [Reply(b"changed")]
    with pytest.raises(ClvrError, match=r"is not the pinned one .*; store the file as .*toy/eval\.py"):
        prompt.fetch("toy")


def test_the_judge_reads_the_official_prompt_and_the_result_says_so(script, server, tmp_path, monkeypatch):
    class Toy(ImagineBench):
        official: ClassVar = script(MESSAGES, "build_messages")

    benchmark = Toy()
    items = benchmark.read(write_lines(tmp_path / "prompts.jsonl", IMAGINE[:1]))
    generate_images(benchmark, items, ColorGenerator().system, tmp_path / "out", settings={}, samples=1)
    images = load_generated(benchmark, tmp_path / "out")
    monkeypatch.setenv("A_KEY", "k")
    judge = endpoint_judge("judge", f"{server.url}/v1", "A_KEY")
    server.script.append(completion(GOOD))
    results = score_images(images, JudgeScorer(judge, "official"))
    assert results["judge"]["rubric"] == f"official, {server.url}/eval.py ({blob_id(MESSAGES.encode())})"
    assert results["pictures"][0]["score"] == pytest.approx(7.8)
    system, user = server.seen[-1].json["messages"]
    assert (system["role"], system["content"]) == ("system", "You are strict.")
    assert user["content"][0] == {"type": "text", "text": "PROMPT: A photo of 1. NOTE: It is changed."}
    assert user["content"][1]["type"] == "image_url"
    assert server.seen[-1].json["max_tokens"] == 77
    ours = score_images(images, JudgeScorer(judge))  # another question, so that the judge is asked again
    assert ours["judge"]["rubric"] != results["judge"]["rubric"]
    assert len(server.seen) == 3
    assert [part["type"] for part in server.seen[-1].json["messages"][0]["content"]] == ["image_url", "text"]


def test_benchmarks_whose_prompt_is_a_text_have_one_and_the_others_refuse():
    assert all(benchmark.official for benchmark in (GenEval2(), ImagineBench(), WiseLegacy(), WiseVerified()))
    for benchmark in (GenEvalPP(), Prism(), DPG()):
        with pytest.raises(UsageError, match="has no text of a prompt for the judge; leave --rubric official out"):
            official_prompt(benchmark)


def test_the_command_refuses_before_anything_is_generated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    judge = ["--judge", "j", "--judge-url", "http://127.0.0.1:9/v1", "--judge-key-variable", ""]
    model = ["--model", "shapes-tiny", "--out", "out"]
    assert main(["eval", "genevalpp", *model, *judge, "--rubric", "official"]) == 2
    assert "leave --rubric official out" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()
