"""Paths that users write: on this machine or in a bucket, and what no bucket can have."""

import importlib.util
from pathlib import Path

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets import paths
from clvr_jax.files.buckets.paths import MAX_NAME_BYTES, absolute, is_bucket, split, storage_path


@pytest.mark.parametrize("text", ["gs://bucket", "gs://bucket/", "gs://my-bucket_1.x/runs/a b", "gs://bucket//a"])
def test_a_path_in_a_bucket_keeps_its_slashes(text):
    path = storage_path(text)
    assert is_bucket(path)
    assert str(path) == str(storage_path(Path(text))) == text.rstrip("/").replace("bucket//", "bucket/")
    assert str(path / "checkpoints" / "4") == f"{path}/checkpoints/4"
    assert absolute(path) == path


def test_other_paths_are_those_of_this_machine():
    for text in ("runs/a", "/tmp/gs:/x", "gs:x", "."):
        assert storage_path(text) == Path(text)
        assert not is_bucket(storage_path(text))
    assert absolute(Path("a")).is_absolute()


def test_a_path_is_split_into_bucket_and_object():
    assert split(storage_path("gs://bucket/a/b")) == ("bucket", "a/b")
    assert split(storage_path("gs://bucket")) == ("bucket", "")


@pytest.mark.parametrize(
    "text",
    [
        "gs://",
        "gs:///a",
        "gs://B/a",
        "gs://b/a",
        "gs://bucket?/a",
        "gs://bucket/../other",
        "gs://bucket/a/./b",
        "gs://bucket/*",
        "gs://bucket/a#1",
        "gs://bucket/[a]",
        "gs://bucket/a\nb",
        "gs://bucket/" + "x" * (MAX_NAME_BYTES + 1),
        "s3://bucket/a",
        "https://storage.googleapis.com/bucket/a",
    ],
)
def test_what_no_bucket_can_have_is_one_line(text):
    with pytest.raises(ClvrError) as caught:
        storage_path(text)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    paths._bucket_path.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name))
    with pytest.raises(ClvrError, match=r"need gcsfs: pip install 'clvr-jax\[gcs\]'"):
        storage_path("gs://bucket/a")
    monkeypatch.undo()
    assert is_bucket(storage_path("gs://bucket/a"))
