"""Objects: whole or absent under faults of the server, and failures that are one line."""

import re

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.objects import ABSENT, COMMIT, GenerationError
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.files.output_paths import check_output_directory
from tests.helpers.bucket_server import InjectedFault

RUN = storage_path("gs://runs/a b/run")


def test_an_object_is_written_read_listed_and_deleted(bucket):
    path = RUN / "sub" / "x.bin"
    assert objects.read(path) is objects.stat(path) is None
    assert not objects.has_entry(path)
    written = objects.write(path, b"first")
    assert objects.stat(path) == written
    assert written.size == 5
    objects.write(path, b"second")
    objects.write(storage_path("gs://runs/a b/run-2"), b"of another directory")
    assert objects.read(path) == b"second"
    assert objects.names(RUN) == ["sub/x.bin"]
    objects.delete(path)
    objects.delete(path)
    assert objects.names(RUN) == []
    assert set(bucket.objects()) == {"a b/run-2"}


def test_of_two_writers_that_expect_the_same_generation_one_is_told(bucket):
    path = RUN / "lock"
    first = objects.write(path, b"first", ABSENT)
    with pytest.raises(GenerationError):
        objects.write(path, b"second", ABSENT)
    objects.write(path, b"third", first.generation)
    with pytest.raises(GenerationError):
        objects.write(path, b"fourth", first.generation)
    objects.delete(path, first.generation)  # that of the third is another one
    assert objects.read(path) == b"third"


FAULTS = [429, 500, 503, "torn", "lost", "slow"]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_request_that_fails_is_repeated(bucket, kind):
    path, content = RUN / "x", bytes(range(256)) * 40
    with bucket.with_faults(InjectedFault(kind)):
        written = objects.write(path, content, ABSENT)
    assert written.generation == bucket.generation("a b/run/x")
    for read, expected in (
        (objects.read, content),
        (objects.stat, written),
        (lambda path: objects.names(path.parent), ["x"]),
    ):
        with bucket.with_faults(fault := InjectedFault(kind)):
            assert read(path) == expected
        assert fault.met == 1
    with bucket.with_faults(InjectedFault(kind)):
        objects.delete(path)
    assert bucket.objects() == {}


PROBLEMS = {
    "no permission": (
        InjectedFault(403, 99, reason="does not have storage.objects.create access"),
        "roles Storage Object User",
    ),
    "no valid credentials": (
        InjectedFault(401, 99, reason="Invalid Credentials"),
        "gcloud auth application-default login",
    ),
    "a full quota": (InjectedFault(403, 99, reason="quotaExceeded"), "quota or the rate limit"),
    "a limit that stays": (InjectedFault(429, 99, reason="rateLimitExceeded"), "quota or the rate limit"),
    "a region that is refused": (
        InjectedFault(400, 99, reason="location constraint of the organization"),
        "location constraint",
    ),
    "a server that is down": (InjectedFault(503, 99), "503"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_directory_that_cannot_be_written_is_one_line(bucket, problem, monkeypatch):
    retry = objects._retry
    monkeypatch.setattr(objects, "_retry", lambda seconds: retry(0.3))
    fault, said = PROBLEMS[problem]
    with bucket.with_faults(fault), pytest.raises(ClvrError, match=re.escape(said)) as caught:
        check_output_directory(RUN)
    assert str(caught.value).startswith(str(RUN))
    assert len(str(caught.value).splitlines()) == 1
    assert "http://" not in str(caught.value)
    assert fault.met
    assert bucket.objects() == {}


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    with pytest.raises(
        ClvrError, match=r"^gs://no-such-bucket/run/\S+: .* there is no bucket no-such-bucket; create it"
    ):
        check_output_directory(storage_path("gs://no-such-bucket/run"))


def test_without_credentials_one_line_says_how_to_get_some(bucket, monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    objects._client.cache_clear()
    with pytest.raises(ClvrError, match=r"no credentials .*gcloud auth application-default login") as caught:
        check_output_directory(RUN)
    assert len(str(caught.value).splitlines()) == 1
    objects._client.cache_clear()


def test_a_server_that_is_not_there_is_one_line(bucket, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    objects._client.cache_clear()
    with pytest.raises(ClvrError, match=r"cannot be written: .*; try again") as caught:
        objects.write(RUN / "x", b"", deadline_seconds=0.5)
    assert len(str(caught.value).splitlines()) == 1
    objects._client.cache_clear()


def test_a_directory_is_complete_when_its_last_object_is_there(bucket, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"1" * 100)
    (tmp_path / "sub" / "b").write_bytes(b"2")
    objects.write(RUN / "old", b"")
    objects.upload_directory(tmp_path, RUN)
    assert objects.names(RUN) == ["a", COMMIT, "sub/b"]
    writes = [seen.name for seen in bucket.seen if seen.writes]
    assert writes[-1] == f"a b/run/{COMMIT}"

    (tmp_path / "a").write_bytes(b"3")
    refused = InjectedFault(403, 99, lambda seen: seen.name.endswith("sub/b") and seen.writes)
    with bucket.with_faults(refused), pytest.raises(ClvrError, match="sub/b: cannot be written"):
        objects.upload_directory(tmp_path, RUN)
    assert COMMIT not in objects.names(RUN)  # half of it is new
    objects.upload_directory(tmp_path, RUN)
    assert COMMIT in objects.names(RUN)
    objects.delete_directory(RUN)
    assert bucket.objects() == {}


def test_json_is_written_and_read_and_a_missing_object_is_named(bucket):
    write_json(RUN / "recipe.json", {"a": "ü"})
    assert read_json(RUN / "recipe.json") == {"a": "ü"}
    with pytest.raises(ClvrError, match=r"^gs://runs/a b/run/none\.json: no such object$"):
        read_json(RUN / "none.json")


def test_a_directory_that_holds_a_model_is_refused(bucket):
    objects.write(RUN / "model_index.json", b"{}")
    with pytest.raises(ClvrError, match="holds a model"):
        check_output_directory(RUN)
    assert set(bucket.objects()) == {"a b/run/model_index.json"}


def test_what_a_killed_check_has_left_is_deleted(bucket):
    objects.write(RUN / ".clvr.probe.0123", b"")
    objects.write(RUN / "recipe.json", b"")
    objects.delete_probes(RUN)
    assert objects.names(RUN) == ["recipe.json"]
