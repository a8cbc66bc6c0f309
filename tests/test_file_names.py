"""Names from data are never paths."""

import re

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.file_names import file_name, is_regular_file, listed_file

HOSTILE = [
    "", ".", "..", "../../x", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:x", "~/x", ".hidden", "-rf", "x" * 300,
    "é" * 90, "a\0b", "a\nb", "a\x1b[2Jb", "\ud800", "name.", " name", "name ", "NUL:", "a?b", "a*b",
    "x~0123456789abcdef",
]  # fmt: skip


@pytest.mark.parametrize("identifier", HOSTILE)
def test_an_id_that_could_be_a_path_becomes_one_safe_name(identifier, tmp_path):
    name = file_name(identifier)
    assert re.fullmatch(r"[A-Za-z0-9-]{0,48}~[0-9a-f]{16}", name)
    (tmp_path / f"{name}.png").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]


@pytest.mark.parametrize("identifier", ["00001", "COCO_val2014_000000000042", "a b", "v1.2-x", "猫", "a~b", "x+y=z"])
def test_names_of_official_layouts_stay(identifier):
    assert file_name(identifier) == identifier


def test_two_ids_never_share_a_name():
    names = [file_name(identifier) for identifier in [*HOSTILE, "a-b", "etc-passwd", file_name("a/b"), "a:b", "a|b"]]
    assert len(set(names)) == len(names)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name in ("outside.png", "data/a.png", "data/sub/b.png"):
        (tmp_path / name).write_text("")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "data" / "inner.png").symlink_to("a.png")
    (tmp_path / "data" / "loop.png").symlink_to("loop.png")
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["a.png", "sub/b.png", "./a.png", "inner.png"])
def test_a_list_names_files_of_its_directory(name, directory):
    assert listed_file(directory, name, "list:1") == directory / name


@pytest.mark.parametrize(
    "name", ["../outside.png", "sub/../../outside.png", "/etc/hostname", "C:\\x", "..\\x", "link.png"]
)
def test_a_list_names_nothing_outside_its_directory(name, directory):
    with pytest.raises(ClvrError, match=r"list:1: .* outside the directory"):
        listed_file(directory, name, "list:1")


@pytest.mark.parametrize("name", ["missing.png", "sub", "", "a\0.png", "x" * 300, "x/" * 3000, "loop.png", "a.png/b"])
def test_a_name_that_no_file_has_is_one_line(name, directory):
    with pytest.raises(ClvrError, match=r"list:1: no such image") as caught:
        listed_file(directory, name, "list:1")
    assert len(str(caught.value).splitlines()) == 1
    assert not is_regular_file(directory / name)


def test_links_of_a_hugging_face_cache_lead_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0f").write_text("")
    (snapshot / "a.png").symlink_to("../../blobs/0f")
    assert listed_file(snapshot, "a.png", "list:1") == snapshot / "a.png"
