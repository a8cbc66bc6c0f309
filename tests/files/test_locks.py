"""The lock on an output directory: who holds it, and what becomes of it when its process dies."""

import json
import multiprocessing
import os
import socket
import time

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files import locks
from clvr_jax.files.locks import LOCK, locked


def hold(folder, begun, end):
    with locked(folder):
        begun.set()
        end.wait(60)


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    context = multiprocessing.get_context("spawn")
    begun, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, begun, end))
    process.start()
    assert begun.wait(60)
    with (
        pytest.raises(ClvrError, match=f"process {process.pid} .* wait for it, or choose another --out"),
        locked(tmp_path),
    ):
        pass
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()  # nobody removed it
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_host_holds_while_it_is_renewed(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"process": 7, "host": "elsewhere", "command": "clvr train"}))
    with pytest.raises(ClvrError, match=r"process 7 \(clvr train\) on elsewhere .* remove .*\.lock"), locked(tmp_path):
        pass
    before = time.time() - 1000
    os.utime(tmp_path / LOCK, (before, before))
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_a_living_process_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_HEARTBEAT_SECONDS", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_without_locks_of_the_system_the_process_decides(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(95, "not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    running = {"process": os.getppid(), "host": socket.gethostname()}
    (tmp_path / LOCK).write_text(json.dumps(running))
    with pytest.raises(ClvrError, match=f"process {os.getppid()}"), locked(tmp_path):
        pass
    (tmp_path / LOCK).write_text(json.dumps({**running, "process": 2**22 + 1}))  # no process has so high a number
    with locked(tmp_path):
        pass
    (tmp_path / LOCK).write_text(json.dumps({**running, "process": 10**30}))
    with locked(tmp_path):
        pass


def test_a_pipe_in_place_of_the_lock_is_one_line(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(ClvrError, match=r"cannot be written \(.*\); choose another --out"), locked(tmp_path):
        pass


def test_a_damaged_lock_file_is_no_obstacle(tmp_path):
    for content in ("{", "[" * 4000, "3", "\0"):
        (tmp_path / LOCK).write_text(content)
        with locked(tmp_path):
            pass
