"""What is written holds whatever a server or a model said."""

import json

import pytest

from clvr_jax.files.atomic_io import write_json, write_text

SAID = {"reply": "naïve 猫 \ud800 \x00", "nested": [{"\udfff": "é"}]}


def test_lone_surrogates_are_escapes_of_json_and_nothing_else_is(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, SAID)
    assert json.loads(path.read_bytes()) == SAID
    assert "naïve 猫 \\ud800" in path.read_text(encoding="utf-8")


def test_text_with_lone_surrogates_is_written(tmp_path):
    write_text(tmp_path / "x.md", "é \ud800")
    assert (tmp_path / "x.md").read_text(encoding="utf-8") == "é \\ud800"


@pytest.mark.parametrize("content", [{1, 2}, object()])
def test_a_file_that_cannot_be_written_is_not_begun(tmp_path, content):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", content)
    assert list(tmp_path.iterdir()) == []
