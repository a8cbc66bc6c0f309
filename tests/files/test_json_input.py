"""JSON from outside: one line that says which file and field."""

import os

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import (
    MAX_DEPTH,
    JsonObject,
    check_unicode,
    parse_json,
    parse_object,
    read_lines,
    read_object,
    read_text,
)


def complaint(function, *arguments, **options):
    with pytest.raises(ClvrError) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 600
    return text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        ("[" * 100_000, "64 levels"),
        ("[" * 100_000 + "]" * 100_000, "64 levels"),
        ('{"a":' * 900 + "1" + "}" * 900, "64 levels"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "64 levels"),
        ("9" * 5000, "4300"),
    ],
)
def test_what_is_no_readable_json(text, said):
    assert said in complaint(parse_json, text, "file:3")


def test_many_values_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr("clvr_jax.files.json_input.MAX_VALUES", 1000)
    assert "more than 1,000 values" in complaint(parse_json, "[" + "{}," * 600 + "0]", "file:3")
    assert parse_json('["' + "a b" * 2000 + '"]', "x") == ["a b" * 2000]


def test_json_is_read_as_it_is():
    assert parse_json("\ufeff" + '{"a": [1, "\\ud800"]}', "x") == {"a": [1, "\ud800"]}
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}
    assert len(parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")) == 1
    assert "expected a JSON object, got a list of 2" in complaint(parse_object, "[1, 2]", "x")


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file; try another" in complaint(read_text, tmp_path / "none", advice="try another")
    assert "not a file" in complaint(read_text, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in complaint(read_object, tmp_path / "pipe")
    for name in ("x" * 300, "a\0b"):
        assert "file" in complaint(read_text, tmp_path / name) or "cannot be read" in complaint(
            read_text, tmp_path / name
        )
    (tmp_path / "large").write_text("[1, 2, 3]")
    assert "at most 0 MiB" in complaint(read_text, tmp_path / "large", max_bytes=4)
    (tmp_path / "lines").write_text("\ufeff{}\n\n 3 \n")
    assert list(read_lines(tmp_path / "lines")) == [
        (f"{tmp_path / 'lines'}:1", "{}"),
        (f"{tmp_path / 'lines'}:3", " 3 "),
    ]


def test_fields_are_returned_if_they_are_right():
    entry = JsonObject(
        {"t": "x", "i": 3, "n": 0.5, "b": True, "o": {"a": 1}, "l": [{"a": 1}], "s": ["x"], "z": None}, "f"
    )
    assert (entry.text("t"), entry.integer("i"), entry.number("n"), entry.number("i")) == ("x", 3, 0.5, 3)
    assert (entry.boolean("b"), entry.nested("o").integer("a"), entry.objects("l")[0].integer("a")) == (True, 1, 1)
    assert (entry.texts("s"), entry.optional("z", entry.text), entry.optional("t", entry.text)) == (("x",), None, "x")
    assert (entry.text("none", "y"), entry.integer("none", None), entry.boolean("none", False)) == ("y", None, False)


@pytest.mark.parametrize("value", [None, True, "x", [], {}, -1, 11, 1.5, float("nan"), 10**400])
def test_an_integer_has_a_type_and_a_range(value):
    said = complaint(JsonObject({"seed": value}, "file: steps[3]").integer, "seed", low=0, high=10)
    assert said.startswith("file: steps[3]: seed must be an integer from 0 to 10, got ")


@pytest.mark.parametrize("value", [None, False, "0.5", [1.0], float("nan"), float("inf"), 10**400, -0.1])
def test_a_number_is_finite_and_in_range(value):
    assert "must be a" in complaint(JsonObject({"p": value}, "f").number, "p", low=0, high=1)


@pytest.mark.parametrize(
    ("method", "value"),
    [("text", 3), ("text", None), ("boolean", 1), ("nested", []), ("objects", {}), ("objects", [1]), ("texts", "abc"),
     ("texts", [1]), ("integers", [True]), ("integers", [-1]), ("integers", None)],
)  # fmt: skip
def test_other_types_are_refused(method, value):
    assert complaint(getattr(JsonObject({"key": value}, "f"), method), "key").startswith("f: key")
    assert complaint(getattr(JsonObject({}, "f"), method), "key") == "f: lacks key"


def test_long_texts_are_not_quoted_in_full():
    assert "at most 10 are allowed" in complaint(JsonObject({"t": "x" * 10**6}, "f").text, "t", max_characters=10)
    complaint(JsonObject({"t": "x" * 10**6}, "f").integer, "t")


def test_lone_surrogates_are_refused_where_files_are_written_again():
    check_unicode({"a": ["é", {"b": "猫"}]}, "f")
    for value in ("\ud800", ["x", "\udcff"], {"\ud800": 1}, {"a": {"b": ["\udfff"]}}):
        assert complaint(check_unicode, value, "f:3").startswith("f:3: ")
