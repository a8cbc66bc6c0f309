"""One real server for all tests: uvicorn in a thread, with the shipped model, on loopback; and one PostgreSQL."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sql
import uvicorn
from sqlalchemy.exc import OperationalError

from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.serving.app import make_app
from clvr_jax.serving.index.store import LoopStore
from clvr_jax.serving.jobs import LoopJob
from clvr_jax.serving.models import ServedModels
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.service import Service
from tests.conftest import optimized
from tests.serving.index.postgres import postgresql

KEY = "sk-test-of-the-server"
PROMPT = "a red circle"
LIMITS = Limits(max_running=4, max_queue=4, max_body_bytes=1 << 20, max_pixels=128 * 128, keepalive_seconds=0.05)
_databases = itertools.count()


@dataclass(frozen=True)
class RunningServer:
    url: str
    service: Service
    pipeline: ClosedLoopPipeline
    out: Path

    def client(self, key: str | None = KEY) -> httpx2.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=300)


def wait_until(is_true, seconds=120.0):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="package", autouse=True)
def optimized_programs():
    """Programs of the server run often: a loop of two images takes some 10 CPU seconds without optimizations."""
    with optimized():
        yield


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[RunningServer]:
    out = tmp_path_factory.mktemp("serving")
    pipeline = ClosedLoopPipeline.from_pretrained("shapes-tiny")
    service = Service(ServedModels(pipeline, "shapes-tiny"), LIMITS, LoopStore(out, 3600, 1 << 30))
    running = uvicorn.Server(uvicorn.Config(make_app(service, KEY), port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve()), daemon=True)
    thread.start()
    wait_until(lambda: running.started and service.scheduler.is_ready)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield RunningServer(f"http://127.0.0.1:{port}", service, pipeline, out)
    running.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def http(server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


class Gate:
    """Holds the device thread before each batch.

    done: number of batches that were performed. is_holding: whether a batch waits now.
    """

    def __init__(self):
        self.is_open, self.is_holding, self.done, self._passes = False, False, 0, threading.Semaphore(0)

    def wait(self):
        self.is_holding = True
        while not self.is_open and not self._passes.acquire(timeout=0.01):
            pass
        self.is_holding = False

    def let_one(self):
        done = self.done
        self._passes.release()
        wait_until(lambda: self.done > done)


@pytest.fixture
def gate(server, monkeypatch):
    """A closed gate before the device; open after the test."""
    gate, perform = Gate(), server.service.scheduler._perform

    def through_gate(key, tasks, is_stopping):
        gate.wait()
        undone = perform(key, tasks, is_stopping)
        gate.done += 1
        return undone

    monkeypatch.setattr(server.service.scheduler, "_perform", through_gate)
    yield gate
    gate.is_open = True
    wait_until(lambda: not server.service.jobs)


class HeldStep:
    """Holds the device thread in the middle of an image: after its second denoising step.

    reached: is set when it holds. released: lets it continue.
    """

    def __init__(self):
        self.reached, self.released = threading.Event(), threading.Event()


@pytest.fixture
def held_step(server, monkeypatch):
    """Holds the second image of a loop, or the first of a one-shot, whichever has two steps first."""
    held, progress = HeldStep(), LoopJob.progress

    def hold(job, work, done, steps):
        progress(job, work, done, steps)
        if done == 2 and (job.state.steps or job.spec.mode == "one-shot") and not held.reached.is_set():
            held.reached.set()
            held.released.wait(300)

    monkeypatch.setattr(LoopJob, "progress", hold)
    yield held
    held.released.set()
    wait_until(lambda: not server.service.jobs)


@pytest.fixture(scope="session")
def postgres_server():
    """The URL of a PostgreSQL server that accepts connections."""
    with postgresql() as url:
        engine = sql.create_engine(url.replace("postgresql:", "postgresql+psycopg:") + "/postgres")
        for _ in range(600):
            try:
                engine.connect().close()
                break
            except OperationalError:
                time.sleep(0.1)
        engine.dispose()
        yield url


@pytest.fixture
def postgres_url(postgres_server):
    """The URL of an empty database."""
    name = f"test_{next(_databases)}"
    engine = sql.create_engine(
        postgres_server.replace("postgresql:", "postgresql+psycopg:") + "/postgres", isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return f"{postgres_server}/{name}"
