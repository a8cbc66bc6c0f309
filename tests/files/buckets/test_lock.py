"""The lock in a bucket: one holder, and what becomes of it when its process or its host dies."""

import json
import multiprocessing
import threading
import time

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files.buckets import lock as lock_module
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.objects import GenerationError
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.files.locks import LOCK, check_lock, locked_output

RUN = storage_path("gs://runs/run")
ELSEWHERE = {"process": 7, "host": "elsewhere", "machine": "another", "start": "1", "command": "clvr train"}


@pytest.fixture
def soon(monkeypatch):
    """Locks are renewed and taken over after fractions of a second."""
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.5)


def hold(url, begun, end):
    """Holds the lock until it is told to end, or killed."""
    import os

    os.environ["STORAGE_EMULATOR_HOST"] = url
    with locked_output(RUN):
        begun.set()
        end.wait(60)


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over_at_once(bucket):
    context = multiprocessing.get_context("spawn")
    begun, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(bucket.url, begun, end))
    process.start()
    assert begun.wait(200)
    said = f"^{RUN}: process {process.pid} .* has been writing to it since .*; wait for it, or choose another --out$"
    with pytest.raises(ClvrError, match=said), locked_output(RUN):
        pass
    process.kill()
    process.join()
    assert set(bucket.objects()) == {f"run/{LOCK}"}
    with locked_output(RUN):
        assert json.loads(objects.read(RUN / LOCK))["process"] != process.pid
        check_lock(RUN)
    assert bucket.objects() == {}


def test_the_lock_of_another_host_holds_while_it_is_renewed(bucket, soon):
    path, ended = RUN / LOCK, threading.Event()
    objects.write(path, json.dumps(ELSEWHERE).encode())

    def renew():
        while not ended.wait(0.1):
            objects.write(path, json.dumps(ELSEWHERE).encode())

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ClvrError, match=r"process 7 \(clvr train\) on elsewhere"), locked_output(RUN):
            pass
    finally:
        ended.set()
        thread.join()
    begun = time.monotonic()
    with locked_output(RUN):  # its host is dead now
        assert time.monotonic() - begun < 30
        assert json.loads(objects.read(path))["host"] != "elsewhere"


def test_an_unreadable_lock_is_taken_over_when_it_is_old(bucket, soon):
    objects.write(RUN / LOCK, b"\xff{")
    with locked_output(RUN):
        pass
    assert bucket.objects() == {}


def test_the_lock_is_renewed_and_a_process_that_has_lost_it_is_told(bucket, soon, monkeypatch):
    with locked_output(RUN):
        first = bucket.generation(f"run/{LOCK}")
        deadline = time.monotonic() + 60
        while bucket.generation(f"run/{LOCK}") == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        check_lock(RUN)
        # Another host has taken it over, as if this one had been suspended.
        objects.write(RUN / LOCK, json.dumps(ELSEWHERE).encode())
        monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.0)
        with pytest.raises(ClvrError, match="another process has taken over this directory"):
            check_lock(RUN)
    assert json.loads(objects.read(RUN / LOCK)) == ELSEWHERE  # it is not deleted either
    check_lock(RUN)  # not held any more: nothing to check


def test_of_many_that_want_it_one_gets_the_lock(bucket):
    held, refused = [], []

    def want():
        try:
            lock_module.BucketLock(RUN / LOCK, {}, lambda holder: "held")
            held.append(1)
        except (ClvrError, GenerationError) as error:
            refused.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), refused) == (1, ["held"] * 3)


def test_shares_of_the_work_need_a_disk(bucket):
    with pytest.raises(ClvrError, match="cannot share the work on a directory in a bucket"), locked_output(RUN, (0, 2)):
        pass
