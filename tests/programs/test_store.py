"""The store: several processes share it, it stays below its size, and nothing that is wrong with it is an error."""

import logging
import multiprocessing
import os
import stat
import time

import pytest

from clvr_jax.errors import UsageError
from clvr_jax.programs import active_store, enable_program_store
from clvr_jax.programs.store import ProgramStore


@pytest.fixture
def store(tmp_path):
    made = ProgramStore(tmp_path / "store", 10_000)
    assert made.prepare()
    return made


def test_programs_and_keys_are_read_as_they_were_written(store):
    store.write_program("c", b"program")
    store.write_key("k", b"value")
    assert store.read_program("c") == b"program"
    assert store.read_key("k") == b"value"
    assert store.read_program("k") is None, "a key is no program"
    assert store.size().programs == 1
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.directory.iterdir()} == {0o600}


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def truncate(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def share(path):
    path.chmod(0o620)


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [damage, truncate, empty, share, link, pipe])
def test_a_file_that_is_not_as_it_was_written_is_not_read(store, harm, caplog):
    store.write_program("c", b"program")
    harm(store.directory / "c.program")
    with caplog.at_level(logging.WARNING, "clvr.programs"):
        assert store.read_program("c") is None
    (record,) = caplog.records
    assert "made anew" in record.getMessage()
    assert "\n" not in record.getMessage()
    store.write_program("c", b"another")
    assert store.read_program("c") == b"another"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to another user")
def test_a_file_or_directory_of_another_user_is_not_read(store, caplog):
    store.write_program("c", b"program")
    os.chown(store.directory / "c.program", 12345, -1)
    assert store.read_program("c") is None
    os.chown(store.directory, 12345, -1)
    assert not store.prepare()
    assert "not a directory of this user" in caplog.text


def test_permissions_of_the_directory_are_taken_back(store):
    store.directory.chmod(0o777)
    assert store.prepare()
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


def test_the_least_recently_used_programs_are_dropped(store):
    for number in range(3):
        store.write_program(f"c{number}", bytes(3000))
        os.utime(store.directory / f"c{number}.program", (number, number))
    assert store.read_program("c0")  # now the most recently used
    store.write_program("c3", bytes(3000))
    kept = {path.stem for path in store.directory.iterdir()}
    assert kept == {"c0", "c2", "c3"}
    assert store.size().nbytes <= store.max_bytes
    store.write_program("large", bytes(20_000))
    assert {path.stem for path in store.directory.iterdir()} == kept, "for one that cannot fit none is dropped"


def test_files_of_processes_that_were_killed_are_removed(store):
    for name, age in [("old.tmp", 10_000), ("new.tmp", 0)]:
        (store.directory / name).write_bytes(b"x")
        os.utime(store.directory / name, (time.time() - age,) * 2)
    store.write_program("c", b"program")
    assert {path.name for path in store.directory.iterdir()} == {"new.tmp", "c.program"}


def write_often(directory, number):
    store = ProgramStore(directory, 10**6)
    for _ in range(200):
        store.write_program("c", bytes([number]) * 5000)
        assert store.read_program("c") is not None
    return len(store.read_program("c"))


def test_processes_that_write_the_same_program_at_once_never_see_a_part(store):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(write_often, [(store.directory, 1), (store.directory, 2)]) == [5000, 5000]
    assert {path.name for path in store.directory.iterdir()} == {"c.program"}


def test_a_directory_that_cannot_be_made_stores_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert not ProgramStore(tmp_path / "file", 10).prepare()
    assert not ProgramStore(tmp_path / "file" / "inside", 10).prepare()
    assert len(caplog.records) == 2


@pytest.fixture
def variables(monkeypatch, tmp_path):
    """Variables of a user who has set none, except for the cache directory; no store stays active."""
    for name in ("CLVR_PROGRAMS", "CLVR_PROGRAMS_GIB", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield monkeypatch
    monkeypatch.setenv("CLVR_PROGRAMS", "off")
    monkeypatch.delenv("CLVR_PROGRAMS_GIB", raising=False)
    enable_program_store()


def test_the_store_is_beside_the_compilation_cache_unless_a_variable_says_otherwise(variables, tmp_path):
    assert enable_program_store().directory == tmp_path / "cache" / "clvr-jax" / "programs"
    assert active_store().max_bytes == 8 * 2**30
    variables.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    variables.setenv("CLVR_PROGRAMS_GIB", "0.5")
    assert enable_program_store().directory == tmp_path / "xla" / "programs"
    assert active_store().max_bytes == 2**29
    variables.setenv("CLVR_PROGRAMS", str(tmp_path / "own"))
    assert enable_program_store().directory == tmp_path / "own"
    variables.setenv("CLVR_PROGRAMS", "gs://bucket/programs")
    assert enable_program_store() is None
    variables.setenv("CLVR_PROGRAMS", "OFF")
    assert enable_program_store() is None
    assert active_store() is None


@pytest.mark.parametrize("text", ["many", "0", "-1", "nan", "1e30"])
def test_a_size_that_is_no_number_of_gib_is_an_error(variables, text):
    variables.setenv("CLVR_PROGRAMS_GIB", text)
    with pytest.raises(UsageError, match="CLVR_PROGRAMS_GIB"):
        enable_program_store()
    assert active_store() is None
