"""Models in buckets: copied as a whole, and only what has changed is copied again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.convert.hub import local_directory, model_files
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import bucket_copies
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.pipelines.loading import lora_path
from tests.commands.command_line import PROMPT, complaint
from tests.helpers.bucket_server import InjectedFault

MODEL = storage_path("gs://runs/models/tiny")
FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"1" * 5000,
    "vae/params/manifest.ocdbt": b"2" * 50,
    "README.md": b"",
}


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    """Copies are made in a directory of the test, each time that one is asked for."""
    monkeypatch.setenv("CLVR_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(bucket_copies, "copied", bucket_copies.copied.__wrapped__)
    return tmp_path / "copies"


def fill(files):
    for name, content in files.items():
        objects.write(MODEL / name, content)


def content(directory):
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths if path.name[0] != "."}


def copied(bucket):
    """Names of the objects whose content was read since the last call."""
    names = [seen.name.removeprefix("models/tiny/") for seen in bucket.seen if "alt=media" in seen.url]
    bucket.seen.clear()
    return sorted(names)


def test_a_model_is_copied_once_and_later_only_what_has_changed(bucket, copies, capsys):
    other = {"flux.safetensors": b"", "pytorch_model.bin": b"", ".hidden": b"", objects.COMMIT: b""}
    fill({**FILES, **other})
    directory = local_directory(str(MODEL))
    assert content(directory) == FILES
    assert directory.is_relative_to(copies)
    assert f"{MODEL}: 5 files, 0.00 GiB, to {directory}" in capsys.readouterr().err
    assert copied(bucket) == sorted(FILES)

    assert local_directory("gs://runs/models/tiny/") == local_directory(Path("gs://runs/models/tiny")) == directory
    assert copied(bucket) == []
    assert capsys.readouterr().err == ""

    fill({"README.md": b"new"})
    objects.delete(MODEL / "vae/params/manifest.ocdbt")
    (directory / "model_index.json").unlink()
    local_directory(str(MODEL))
    assert copied(bucket) == ["README.md", "model_index.json"]
    assert content(directory) == {**{name: FILES[name] for name in FILES if "vae" not in name}, "README.md": b"new"}


def test_an_object_whose_name_leads_out_of_the_directory_is_not_copied():
    names = ["a/../b.json", "../b.json", "/etc/b.json", "a//b.json", ".hidden/b.json", "a/b.json", "a/.zarray"]
    assert [name for name in names if bucket_copies._is_wanted(name, ("*",))] == ["a/b.json", "a/.zarray"]


@pytest.mark.parametrize("kind", [429, 503, "torn", "lost"])
def test_a_response_that_fails_is_asked_for_again(bucket, kind):
    fill(FILES)
    with bucket.with_faults(fault := InjectedFault(kind, 3, lambda seen: "alt=media" in seen.url)):
        assert content(local_directory(str(MODEL))) == FILES
    assert fault.met == 3


def test_a_copy_that_is_interrupted_is_continued_and_never_taken_for_complete(bucket):
    fill(FILES)
    denied = InjectedFault(403, 99, lambda seen: "alt=media" in seen.url and "safetensors" in seen.name)
    with bucket.with_faults(denied), pytest.raises(ClvrError, match=r"safetensors: cannot be copied: 403"):
        local_directory(str(MODEL))
    assert content(local_directory(str(MODEL))) == FILES


def test_a_model_that_is_replaced_meanwhile_is_one_line(bucket):
    fill(FILES)
    listed = objects.stats(MODEL)
    fill({"transformer/config.json": b"new"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "stats", lambda directory: listed)
        with pytest.raises(ClvrError, match=r"^gs://runs/models/tiny: was changed while it was copied; try again$"):
            local_directory(str(MODEL))
    assert content(local_directory(str(MODEL)))["transformer/config.json"] == b"new"


def test_what_cannot_be_copied_is_one_line(bucket, copies, monkeypatch):
    with pytest.raises(ClvrError, match=r"^gs://runs/none: nothing is stored there"):
        local_directory("gs://runs/none")
    with pytest.raises(ClvrError, match=r"there is no bucket no-such-bucket"):
        local_directory("gs://no-such-bucket/model")
    with pytest.raises(UsageError, match=r"no revision 'v1'"):
        local_directory(str(MODEL), "v1")
    fill(FILES)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(ClvrError, match=r"0\.0 GiB are free in .*; set CLVR_COPIES to a larger disk"):
            local_directory(str(MODEL))
    copies.parent.joinpath("file").write_text("")
    monkeypatch.setenv("CLVR_COPIES", str(copies.parent / "file" / "x"))
    with pytest.raises(ClvrError, match=r"cannot be written .* set CLVR_COPIES"):
        local_directory(str(MODEL))


def test_a_lora_in_a_bucket_is_refused():
    with pytest.raises(ClvrError, match=r"^gs://runs/lora: a URL, not a file or directory of this machine"):
        lora_path("gs://runs/lora")


def test_patterns_choose_the_tensors(bucket):
    fill({"model.safetensors": b"1", "model.fp16.safetensors": b"2", "config.json": b"{}"})
    directory = local_directory(str(MODEL), allow_patterns=model_files("fp16"))
    assert set(content(directory)) == {"model.fp16.safetensors", "config.json"}


@pytest.mark.slow
def test_an_image_of_a_model_in_a_bucket_is_that_of_the_model_on_a_disk(bucket, drawing_model, tmp_path, capsys):
    for path in (path for path in drawing_model.rglob("*") if path.is_file()):
        objects.write(MODEL / path.relative_to(drawing_model).as_posix(), path.read_bytes())
    images = []
    for model in (str(drawing_model), str(MODEL)):
        out = tmp_path / f"{len(images)}.png"
        assert main(["sample", PROMPT, "--model", model, "--steps", "1", "--out", str(out)]) == 0
        images.append(np.asarray(Image.open(out)))
    assert np.array_equal(*images)
    capsys.readouterr()
    assert main(["sample", PROMPT, "--model", "gs://runs/none", "--out", str(tmp_path / "none.png")]) == 1
    assert "gs://runs/none: nothing is stored there" in complaint(capsys)
