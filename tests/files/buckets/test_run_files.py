"""Growing files: copied when they have changed, and before the end."""

import threading

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets import run_files as module
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.files.buckets.run_files import run_files, staged
from tests.helpers.bucket_server import InjectedFault

RUN = storage_path("gs://runs/run")


def free() -> None:
    """Nobody else writes there."""


def test_files_of_a_directory_on_a_disk_are_written_there(tmp_path):
    with run_files(tmp_path, free) as files:
        assert files.directory == tmp_path
        assert not files.is_copied
        files.copy()
    with staged(tmp_path / "export") as directory:
        assert directory == tmp_path / "export"


def test_only_what_has_changed_is_copied(bucket):
    with run_files(RUN, free) as files:
        (files.directory / "sub").mkdir()
        (files.directory / "sub" / "events").write_bytes(b"1")
        (files.directory / "metrics.jsonl").write_bytes(b"a\n")
        (files.directory / "wandb").mkdir()
        (files.directory / "wandb" / "log").write_bytes(b"")
        files.copy()
        assert bucket.objects() == {"run/sub/events": b"1", "run/metrics.jsonl": b"a\n"}
        before = len(bucket.seen)
        with (files.directory / "metrics.jsonl").open("ab") as file:
            file.write(b"b\n")
        files.copy()
        assert len([seen for seen in bucket.seen[before:] if seen.writes]) == 1
        with (files.directory / "metrics.jsonl").open("ab") as file:
            file.write(b"c\n")
    assert bucket.objects()["run/metrics.jsonl"] == b"a\nb\nc\n"
    assert not files.directory.exists()
    with run_files(RUN, free) as files:
        files.fetch("metrics.jsonl")
        files.fetch("none")
        assert [path.name for path in files.directory.iterdir()] == ["metrics.jsonl"]
        assert (files.directory / "metrics.jsonl").read_bytes() == b"a\nb\nc\n"


def test_files_are_copied_in_the_background_and_after_an_error(bucket, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.05)
    copied = threading.Event()
    bucket.before_answer = lambda seen: copied.set() if seen.writes else None

    def run():
        with run_files(RUN, free) as files:
            (files.directory / "a").write_bytes(b"1")
            assert copied.wait(60)
            (files.directory / "b").write_bytes(b"2")
            raise KeyError("the run has failed")

    with pytest.raises(KeyError):
        run()
    assert bucket.objects() == {"run/a": b"1", "run/b": b"2"}


def test_nothing_is_copied_by_a_process_that_must_not_write(bucket):
    def taken_over():
        raise ClvrError("taken over")

    with pytest.raises(ClvrError, match="taken over"), run_files(RUN, taken_over) as files:
        (files.directory / "a").write_bytes(b"1")
    assert bucket.objects() == {}


def test_a_file_that_cannot_be_copied_is_one_line(bucket):
    refused = InjectedFault(403, 99, lambda seen: seen.writes)
    with (
        bucket.with_faults(refused),
        pytest.raises(ClvrError, match=r"run/a: cannot be written: 403"),
        run_files(RUN, free) as files,
    ):
        (files.directory / "a").write_bytes(b"1")


def test_an_export_appears_as_a_whole_and_one_that_fails_not_at_all(bucket):
    def fail():
        with staged(RUN / "export") as directory:
            directory.mkdir()
            (directory / "half").write_bytes(b"")
            raise KeyError("the export has failed")

    with pytest.raises(KeyError):
        fail()
    assert bucket.objects() == {}
    with staged(RUN / "export") as directory:
        directory.mkdir()
        (directory / "w").write_bytes(b"1")
    assert set(bucket.objects()) == {"run/export/w", "run/export/commit_success.txt"}
