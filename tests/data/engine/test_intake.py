"""Tests of the selection of prompts."""

import json

import pytest

from clvr_jax.data.engine.intake import EvaluationPrompts, Refused, filter_prompts, prompt_id, read_prompts
from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import MAX_LINE_BYTES
from clvr_jax.worlds.shapes.prompts import evaluation_prompts

DENSE = "A red circle is above a blue square, and three green stars are to the left of a yellow triangle."


def refused(prompts, evaluation=(), **options):
    items = [PromptItem(f"n{number}", prompt) for number, prompt in enumerate(prompts)]
    found = filter_prompts(items, EvaluationPrompts(evaluation), **options)
    return [one.reason if isinstance(one, Refused) else "" for one in found]


def test_empty_duplicate_and_long_prompts_are_refused_and_other_scripts_are_not():
    texts = ["a cat", "A  Cat!", "", " \n", "...", "x" * 50_000, "一只红色的猫", "красный кот", "🐈", "قطة حمراء"]
    reasons = ["", "duplicate", "empty", "empty", "empty", "too long", "", "", "empty", ""]
    assert refused(texts) == reasons


def test_evaluation_prompts_are_found_also_with_a_changed_word():
    changed = DENSE.replace("yellow", "orange")
    other = "Two purple crosses are below a cyan star, and a black square is in the center of the picture."
    assert refused([DENSE.upper(), changed, other], [DENSE]) == ["evaluation prompt", "evaluation prompt", ""]
    assert refused(["一只红色的猫坐在蓝色的椅子上面看书"], ["一只红色的猫坐在蓝色的椅子上面看书。"]) == [
        "evaluation prompt"
    ]
    strict = EvaluationPrompts([DENSE], threshold=1.0)
    assert DENSE.lower() in strict
    assert changed not in strict


@pytest.mark.slow
def test_every_evaluation_prompt_of_the_shapes_world_finds_itself():
    texts = [metadata["prompt"] for name in ("eval", "complex") for metadata in evaluation_prompts(name)]
    known = EvaluationPrompts(texts)
    assert all(text in known for text in texts)
    assert "a photo of a wooden house beside a lake, in the style of an old postcard" not in known


def test_invalid_thresholds_and_ids_are_errors():
    with pytest.raises(ClvrError, match="threshold"):
        EvaluationPrompts([], threshold=0)
    with pytest.raises(ClvrError, match="two prompts have the id 'a'"):
        list(filter_prompts([PromptItem("a", "one"), PromptItem("a", "two")], EvaluationPrompts([])))


def test_prompts_are_read_from_lines_and_from_json_lines(tmp_path):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("a cat\n\na dog\n", encoding="utf-8")
    assert [(item.prompt, item.id) for item in read_prompts(plain)] == [
        (text, prompt_id(text)) for text in ("a cat", "", "a dog")
    ]
    lines.write_text(
        json.dumps({"prompt": "a cat", "id": "cat-1", "metadata": {"tag": "x"}}) + "\n" + '{"prompt": "b"}'
    )
    assert list(read_prompts(lines)) == [PromptItem("cat-1", "a cat", {"tag": "x"}), PromptItem(prompt_id("b"), "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\nnot json', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", b'{"text": "a"}', "prompt"),
        ("p.jsonl", b'{"prompt": "a", "id": "../a"}', "no valid file name"),
        ("p.jsonl", b'{"prompt": "a", "metadata": 3}', "metadata must be"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("absent.txt", None, "no such file; give a file with a prompt in each line"),
        ("p.jsonl", b"[" * 100_000, r"p\.jsonl:1: JSON with more than 64 levels is not read"),
        ("p.jsonl", b'{"prompt": 3}', "prompt must be a text, got 3"),
        ("p.jsonl", b'{"prompt": "a \\ud800"}', "lone surrogate"),
        ("p.txt", b"a\n" + b"x" * (MAX_LINE_BYTES + 1), r"p\.txt:2: has more than 4096 KiB"),
    ],
)
def test_errors_of_other_files_name_the_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ClvrError, match=message):
        list(read_prompts(tmp_path / name))
