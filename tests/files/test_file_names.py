"""Names from data are never paths."""

import re
from pathlib import Path

import pytest

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError
from clvr_jax.files.file_names import file_name, is_regular_file, listed_file, local_path, refuse_url, shown_path
from clvr_jax.files.image_io import read_image
from clvr_jax.files.json_input import read_text, stream_lines
from clvr_jax.files.output_paths import check_output_directory
from clvr_jax.reasoning.trajectories.trajectory import Trajectory

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


@pytest.mark.parametrize("url", ["gs://bucket/name", "s3://b", "https://host/a//b", "file:///etc", "a+b-c.d://x"])
def test_a_url_is_refused_and_shown_as_it_was_given(url):
    for given in (url, Path(url)):
        with pytest.raises(ClvrError) as caught:
            refuse_url(given)
        whole = url if isinstance(given, str) else url.replace("a//b", "a/b").replace(":///", "://")
        assert str(caught.value).startswith(f"{whole}: a URL, not a file or directory of this machine")
    assert shown_path(Path("gs://bucket/x y")) == "gs://bucket/x y"


@pytest.mark.parametrize("name", ["a/b", "/tmp/gs:/x", "c:/models", "./gs:x", "gs:x", ".", "A:/x"])
def test_other_names_are_paths(name):
    assert local_path(name) == Path(name)
    assert shown_path(name) == name


@pytest.mark.parametrize(
    "read", [read_text, lambda path: list(stream_lines(path)), read_image, Trajectory.load, check_output_directory]
)
def test_readers_and_writers_name_a_url_with_both_slashes(read):
    with pytest.raises(ClvrError, match=r"^gs://bucket/a\.png: "):
        read(Path("gs://bucket/a.png"))


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a red circle", "--out", "gs://bucket/out"],
        ["verify", "a red circle", "gs://bucket/a.png"],
        ["train", "flux2_lora", "--dataset", "gs://bucket/data"],
        ["train", "shapes_controller", "--out", "s3://bucket/run"],
        ["serve", "--out", "gs://bucket/loops"],
    ],
)
def test_a_url_in_a_command_line_is_one_line_with_both_slashes(command, capsys):
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert command[-1] in line
