"""Two services in one process over one PostgreSQL, with models that are scripts: takeovers, hand-backs and failures."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from clvr_jax.reasoning import Budget
from clvr_jax.reasoning.loop.work import Roles, perform
from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.event_log import EventLog
from clvr_jax.serving.index.records import Command, Progress
from clvr_jax.serving.index.shared import SharedStore
from clvr_jax.serving.jobs import LoopJob, LoopSpec
from clvr_jax.serving.models import StageKey
from clvr_jax.serving.replicas import remote
from clvr_jax.serving.replicas.remote import stop_elsewhere
from clvr_jax.serving.replicas.replica import EVENT_GAP, MAX_RESUMPTIONS
from clvr_jax.serving.replicas.specs import given_files, spec_to_json
from clvr_jax.serving.scheduling.limits import Limits
from clvr_jax.serving.service import Service
from tests.reasoning.loop.test_resumable import GIVEN, NoisyVerifier
from tests.reasoning.scripted import NoisyController, NoisyDrawer
from tests.serving.conftest import wait_until

SPEC = LoopSpec("p", 18, budget=Budget(max_steps=6), images=GIVEN, request={"user": "u"})


class ScriptedModels:
    """What a service asks of its models. gate: holds the device before each batch. is_broken: its thread ends there."""

    name, chat_name, has_loop = "scripted", None, True
    flux = SimpleNamespace(settings=SimpleNamespace(num_inference_steps=4))

    def __init__(self):
        self.gate, self.num_batches, self.is_broken = threading.Semaphore(0), 0, False

    def key(self, work, sampling):
        return StageKey(type(work).__name__)

    def perform(self, key, tasks, *_):
        self.gate.acquire()
        if self.is_broken:
            raise SystemExit
        perform([(task.job, task.work) for task in tasks], Roles(NoisyController(), NoisyDrawer(), NoisyVerifier()))
        self.num_batches += 1
        return ()

    def let(self, count):
        """Lets this many batches pass, and waits for them."""
        end = self.num_batches + count
        self.gate.release(count)
        wait_until(lambda: self.num_batches == end, 600)

    def open(self):
        self.gate.release(10**6)


class Replicas:
    """Makes services that share a database and a directory; they have an event loop of their own."""

    def __init__(self, url, place):
        self._url, self._place, self._opened = url, place, []
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def start(self, name, lease_seconds=1.0, **limits):
        store = SharedStore(self._url, self._place, name, lease_seconds, 1e9, 1 << 30)
        service = Service(ScriptedModels(), Limits(**{"drain_seconds": 0.0, **limits}), store)

        async def start():
            service.start()

        asyncio.run_coroutine_threadsafe(start(), self.loop).result(600)
        wait_until(lambda: service.scheduler.is_ready, 600)
        self._opened.append(service)
        return service

    def execute(self, statement):
        with self._opened[0].store._engine.begin() as connection:
            connection.exec_driver_sql(statement)

    def expire(self, is_done, *changes):
        """Lets the leases of the replica "a" expire, again and again, because it renews them once when it starts."""

        def expired():
            self.execute(f"UPDATE runs SET {', '.join(['expires = 0', *changes])} WHERE owner = 'a'")
            return is_done()

        wait_until(expired, 600)

    def close(self):
        for service in self._opened:
            service.models.open()
        for service in self._opened:
            service.close()
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture
def replicas(postgres_url, tmp_path):
    replicas = Replicas(postgres_url, str(tmp_path / "shared"))
    yield replicas
    replicas.close()


@pytest.fixture
def undisturbed(replicas):
    """The trajectory of SPEC on a replica that nothing happens to."""
    service = replicas.start("undisturbed")
    service.models.open()
    (job,) = service.submit([SPEC])
    found = job.result.result(600)
    service.replica.stop_taking()
    assert len(found.generated) > 2
    return content(found)


def content(trajectory):
    steps = [(step.reasoning, step.image.tobytes(), step.verification) for step in trajectory.generated]
    return steps, trajectory.outcome, trajectory.given_images[0].tobytes()


def is_finished(service, loop_id):
    return service.store.entry(loop_id)["status"] == "finished"


def test_a_loop_whose_replica_is_silent_moves_and_only_its_new_owner_finishes_it(replicas, undisturbed):
    a, b = replicas.start("a", lease_seconds=600), replicas.start("b")
    (job,) = a.submit([SPEC])
    a.models.let(7)
    images = len(job.state.steps)
    wait_until(lambda: a.store.run(job.id).images == images, 600)
    seen = job.log.events
    replicas.expire(lambda: job.id in b.jobs)
    assert len(b.jobs[job.id].state.steps) == images
    b.models.open()
    wait_until(lambda: is_finished(b, job.id), 600)
    a.models.open()  # it has not noticed anything yet
    with pytest.raises(ApiError, match="another one continues the loop") as caught:
        job.result.result(600)
    assert caught.value.status_code == 503
    assert content(b.store.trajectory(job.id)) == undisturbed
    events = b.store.events(job.id)
    kinds = [event["type"] for event in events]
    assert (kinds.count("queued"), kinds.count("started"), kinds.count("resumed"), kinds.count("done")) == (1, 1, 1, 1)
    # A client that has seen all events of the first replica gets all that came after.
    resumed = next(event for event in events if event["type"] == "resumed")
    assert resumed["id"] > max(event["id"] for event in seen)
    assert resumed["id"] >= EVENT_GAP
    assert [event["step"] for event in events if event["type"] == "image"] == list(range(len(undisturbed[0])))


def test_a_replica_that_stops_hands_its_loops_back(replicas, undisturbed):
    a, b = replicas.start("a", lease_seconds=600, max_running=1), replicas.start("b")
    jobs = a.submit([SPEC, SPEC])  # the second one waits
    a.models.let(6)
    stopping = threading.Thread(target=a.drain)
    stopping.start()
    a.models.open()  # a batch that runs cannot be interrupted
    stopping.join(600)
    b.models.open()
    for job in jobs:
        with pytest.raises(ApiError, match="another one continues"):
            job.result.result(600)
        assert [event["type"] for event in job.log.events][-1] != "done"
        wait_until(lambda: is_finished(b, job.id), 600)  # noqa: B023 - called at once
        assert content(b.store.trajectory(job.id)) == undisturbed
    assert [run.resumptions for run in b.store.runs([job.id for job in jobs])] == []


def test_a_loop_that_may_kill_replicas_is_given_up(replicas):
    a, b = replicas.start("a", lease_seconds=600), replicas.start("b")
    (job,) = a.submit([SPEC])
    replicas.expire(lambda: b.store.entry(job.id)["status"] == "failed", f"resumptions = {MAX_RESUMPTIONS}")
    times = MAX_RESUMPTIONS + 1
    assert b.store.entry(job.id)["error"] == f"its replica died, or could not resume it, {times} times"


def test_a_loop_that_cannot_be_restored_is_tried_again_and_then_given_up(replicas, tmp_path, caplog):
    a, b = replicas.start("a", lease_seconds=600), replicas.start("b")
    (job,) = a.submit([SPEC])
    (tmp_path / "shared" / job.id / "given_00.png").unlink()
    replicas.expire(lambda: b.store.entry(job.id)["status"] == "failed")
    assert caplog.text.count("cannot be resumed: ") == MAX_RESUMPTIONS
    error = b.store.entry(job.id)["error"]
    assert error.endswith(f"; at last: {job.id}: lacks the image given_00.png that it starts from")


@pytest.mark.parametrize(
    ("column", "path", "value", "said"),
    [
        ("spec", "{sampling,size}", "[64]", "size must be height and width"),
        ("spec", "{sampling,steps}", '"4"', "steps must be an integer"),
        ("spec", "{sampling,scale}", "2", "unknown field"),
        ("spec", "{budget,max_steps}", "0", "max_steps must be at least 1"),
        ("spec", "{seed}", "null", "seed must be an integer"),
        ("snapshot", "{plans}", '"x"', "snapshot: is damaged"),
        ("snapshot", "{elapsed}", "-1", "elapsed must be a finite number"),
    ],
)
def test_a_loop_whose_row_is_damaged_fails_at_once_and_disturbs_no_other(replicas, column, path, value, said):
    a, b = replicas.start("a", lease_seconds=600), replicas.start("b")
    damaged, whole = (job.id for job in a.submit([SPEC] * 2))
    # What it saves when they start would repair the row.
    wait_until(lambda: all(run.started for run in a.store.runs([damaged, whole])), 600)
    replicas.execute(
        f"UPDATE runs SET {column} = jsonb_set({column}::jsonb, '{path}', '{value}')::text WHERE loop_id = '{damaged}'"
    )
    replicas.expire(lambda: whole in b.jobs)
    wait_until(lambda: b.store.entry(damaged)["status"] == "failed", 600)
    assert said in b.store.entry(damaged)["error"]
    b.models.open()
    wait_until(lambda: is_finished(b, whole), 600)
    assert b.scheduler.is_alive


def test_accept_and_cancel_wait_until_the_other_replica_has_them(replicas, monkeypatch):
    a, b = replicas.start("a", lease_seconds=600), replicas.start("b")
    ghost = SharedStore(replicas._url, replicas._place, "ghost", 600, 1e9, 1 << 30)  # a replica that reads nothing

    def stop(loop_id, kind):
        stopping = stop_elsewhere(b, b.store.run(loop_id), kind)
        return asyncio.run_coroutine_threadsafe(stopping, b.loop).result(600)

    without_image, canceled = (job.id for job in a.submit([SPEC] * 2))
    with pytest.raises(ApiError, match="no image yet"):
        stop(without_image, "accept")
    assert stop(canceled, "cancel")
    assert canceled in a.scheduler._stops or canceled not in a.jobs
    silent = LoopJob(SPEC, a.models, EventLog(None), lambda *_: None)
    ghost.accept(silent.listing(), spec_to_json(SPEC), Progress(None, 0, None, None, [], given_files(SPEC)))
    monkeypatch.setattr(remote, "STOP_SECONDS", 0.3)
    assert not stop(silent.id, "cancel")
    assert [command.kind for command in ghost.commands()] == ["cancel"]  # it is there when the replica is back
    ended = threading.Timer(0.2, lambda: ghost.withdraw([silent.id]))
    monkeypatch.setattr(remote, "STOP_SECONDS", 600)
    ended.start()
    assert stop(silent.id, "cancel")
    ghost.close()


def test_loops_of_a_replica_whose_device_fails_move_too(replicas, undisturbed):
    a, b = replicas.start("a", lease_seconds=1), replicas.start("b")
    (job,) = a.submit([SPEC])
    a.models.let(4)
    a.models.is_broken = True
    a.models.open()
    with pytest.raises(ApiError, match="another one continues"):
        job.result.result(600)
    b.models.open()
    wait_until(lambda: is_finished(b, job.id), 600)
    assert content(b.store.trajectory(job.id)) == undisturbed


def test_lost_connections_to_the_database_lose_no_loop(replicas, undisturbed):
    a = replicas.start("a", lease_seconds=600)
    (job,) = a.submit([SPEC])
    for _ in range(4):
        a.models.let(1)
        replicas.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    a.models.open()
    assert content(job.result.result(600)) == undisturbed
    assert is_finished(a, job.id)
    wait_until(lambda: a.replica.is_connected, 600)


def test_commands_of_another_replica_are_carried_out_between_two_works(replicas):
    a, b = replicas.start("a", lease_seconds=600), replicas.start("b")
    edited, accepted, canceled = (job.id for job in a.submit([SPEC] * 3))
    b.store.send(Command("1", edited, "plan", {"requirements": ["a dog"], "instruction": None}))
    b.store.send(Command("2", edited, "rollback", {"step": 50}))
    b.store.send(Command("3", canceled, "cancel", {}))
    b.store.send(Command("4", accepted, "accept", {}))  # it has no image, which the other replica would have seen
    wait_until(lambda: b.store.outcome("4") is not None, 600)
    a.models.open()
    wait_until(lambda: b.store.outcome("2") is not None or b.store.run(edited) is None, 600)
    wait_until(lambda: not b.store.runs([edited, accepted, canceled]), 600)
    assert b.store.entry(canceled)["status"] == "canceled"
    assert b.store.entry(accepted)["status"] == "finished"
    assert b.store.trajectory(edited).edits[0].requirements == ("a dog",)
    # Nothing is left of loops that have ended, but answers that nobody has fetched, for an hour.
    statuses = [(b.store.outcome(number) or {}).get("status") for number in "1234"]
    assert statuses == [200, 422, 202, 400]
    replicas.execute("UPDATE commands SET created = created - 3700")
    a.store.delete_old()
    with a.store._engine.connect() as connection:
        for table in ("commands", "events", "runs"):
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 0
