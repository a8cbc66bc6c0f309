"""The store of several replicas, over a real PostgreSQL and a directory or a bucket that they share."""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import fsspec
import pytest
import sqlalchemy as sql
from fsspec.implementations.memory import MemoryFileSystem

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import encode_png
from clvr_jax.reasoning import Step, Trajectory
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN
from clvr_jax.serving.index.records import Command, NewLoop, Progress
from clvr_jax.serving.index.rows import DamagedRowError
from clvr_jax.serving.index.shared import LostLeaseError, SharedStore
from clvr_jax.serving.index.tables import IndexUnavailableError
from tests.reasoning.scripted import picture
from tests.serving.index.postgres import PASSWORD

KEPT = 1 << 30


class Bucket(MemoryFileSystem):
    """fsspec's file system in memory as gs://, whose name in fsspec is gcs."""

    protocol = "gs"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


def loop_id(number: int) -> str:
    return f"loop_{number:024x}"


def trajectory(value: int = 7) -> Trajectory:
    return Trajectory("p", (Step("Draw.", IMAGE_GEN, image=picture(value), nfe=4),), "unverified")


def progress(*events, images=0, snapshot=None, files=None):
    shown = [{"id": number, "type": kind} for number, kind in events]
    return Progress(1.0 if images else None, images, images - 1 if images else None, snapshot, shown, files or {})


def accept(store, number, prompt="p", **fields):
    loop = NewLoop(loop_id(number), float(number), "loop", prompt, "m", 0, {"user": "u"})
    store.accept(loop, {"prompt": prompt, "mode": "loop", "given": 0}, progress((0, "queued"), **fields))


def execute(store, statement):
    with store._engine.begin() as connection:
        connection.exec_driver_sql(statement)


def expire(store):
    execute(store, "UPDATE runs SET expires = 0")


@pytest.fixture(params=["directory", "bucket"])
def stores(request, postgres_url, tmp_path, monkeypatch):
    """Two replicas."""
    place = str(tmp_path / "files")
    if request.param == "bucket":
        monkeypatch.setattr(Bucket, "store", {})
        monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
        fsspec.register_implementation("gcs", Bucket, clobber=True)
        place = "gs://bucket/loops"
    opened = [SharedStore(postgres_url, place, name, 60, 1e9, KEPT) for name in ("a", "b")]
    yield opened
    for store in opened:
        store.close()
    importlib.import_module("fsspec.registry")._registry.pop("gcs", None)


def test_each_replica_has_the_loops_of_all(stores):
    a, b = stores
    accept(a, 1, "Ein GRÜNES Rechteck\0")
    accept(b, 2)
    assert [entry["id"] for entry in a.entries(9)] == [loop_id(2), loop_id(1)] == [e["id"] for e in b.entries(9)]
    assert [entry["id"] for entry in b.entries(9, query="grünes")] == [loop_id(1)]
    assert [entry["id"] for entry in b.entries(9, query="%")] == []
    assert b.entries(9, query="ein \0") == b.entries(9, before=loop_id(2))
    assert (b.run(loop_id(1)).owner, a.run(loop_id(2)).owner) == ("a", "b")
    assert not b.forget(loop_id(1))  # it runs
    a.finish(loop_id(1), "finished", trajectory(5), [{"id": 0, "type": "done"}])
    assert (b.entry(loop_id(1))["status"], b.entry(loop_id(1))["request"]) == ("finished", {"user": "u"})
    assert b.run(loop_id(1)) is None
    assert b.image(loop_id(1), 0)[0, 0, 0] == b.trajectory(loop_id(1)).image[0, 0, 0] == 5
    assert b.events_after(loop_id(1), -1) == ([{"id": 0, "type": "done"}], False)
    with b.local(loop_id(1)) as directory:
        names = {path.name for path in directory.iterdir()}
    assert names == {"trajectory.json", "step_00.png", "index.html", "events.json"}
    assert b.forget(loop_id(1))
    assert a.entry(loop_id(1)) is None
    with pytest.raises(ClvrError, match="no such image"):
        a.image(loop_id(1), 0)
    a.withdraw([loop_id(2)])
    assert a.entries(9) == []


def test_a_running_loop_is_seen_from_another_replica(stores):
    a, b = stores
    accept(a, 1)
    snapshot = {"trajectory": trajectory(3).to_dict(), "seconds": 1.5}
    a.save(loop_id(1), progress((1, "plan"), (2, "image"), images=1, snapshot=snapshot,
                                files={"step_00.png": encode_png(picture(3))}))  # fmt: skip
    run = b.run(loop_id(1))
    assert (run.images, run.best, run.started, run.snapshot["seconds"]) == (1, 0, 1.0, 1.5)
    assert b.image(loop_id(1), 0)[0, 0, 0] == 3
    assert [event["id"] for event in b.events_after(loop_id(1), 0)[0]] == [1, 2]
    found = b.running_trajectory(run)
    assert (len(found.steps), found.steps[0].image[0, 0, 0]) == (1, 3)


def test_a_loop_is_taken_over_only_after_its_lease_and_its_old_owner_cannot_finish_it(stores):
    a, b = stores
    for number in (1, 2):
        accept(a, number)
    assert b.take_over(9) == []
    expire(a)
    assert a.renew() == {loop_id(1), loop_id(2)}  # in time
    assert b.take_over(9) == []
    expire(a)
    assert a.take_over(9) == []  # its own ones are renewed
    (run,) = b.take_over(1)
    assert (run.loop_id, run.owner, run.resumptions) == (loop_id(1), "b", 1)
    assert a.renew() == {loop_id(2)}
    for lost in (
        lambda: a.save(loop_id(1), progress((1, "plan"))),
        lambda: a.finish(loop_id(1), "finished", trajectory(), []),
        lambda: a.fail(loop_id(1), "error"),
        lambda: a.hand_back(loop_id(1)),
    ):
        with pytest.raises(LostLeaseError, match="another replica"):
            lost()
    assert [event["type"] for event in a.events_after(loop_id(1), -1)[0]] == ["queued"]
    b.finish(loop_id(1), "finished", trajectory(), [])
    assert a.entry(loop_id(1))["status"] == "finished"
    a.hand_back(loop_id(2))
    (run,) = b.take_over(9)
    assert (run.loop_id, run.resumptions) == (loop_id(2), 0)  # nobody died


def test_no_two_replicas_take_the_same_loop(stores):
    for number in range(40):
        accept(stores[0], number)
    expire(stores[0])
    together = threading.Barrier(8)

    def take(number):
        together.wait()
        found = []
        while runs := stores[number % 2].take_over(3):
            found += [run.loop_id for run in runs]
        return found

    with ThreadPoolExecutor(8) as pool:
        taken = [each for found in pool.map(take, range(8)) for each in found]
    assert sorted(taken) == [loop_id(number) for number in range(40)]


def test_a_command_reaches_the_owner_also_the_next_one(stores):
    a, b = stores
    accept(a, 1)
    b.send(Command("c1", loop_id(1), "plan", {"requirements": None, "instruction": "x"}))
    b.send(Command("c2", loop_id(1), "cancel", {}))
    assert b.commands() == []
    assert [command.id for command in a.commands()] == ["c1", "c2"]
    assert b.outcome("c1") is None
    a.answer("c1", {"status": 200})
    assert b.outcome("c1") == {"status": 200}
    expire(a)
    assert len(b.take_over(1)) == 1
    assert (a.commands(), [command.kind for command in b.commands()]) == ([], ["cancel"])
    b.retract("c2")
    assert b.commands() == []


def test_old_loops_are_deleted_with_their_files(stores, postgres_url):
    a, _ = stores
    for number in (1, 2):
        accept(a, number)
    a.finish(loop_id(1), "finished", trajectory(), [])
    a._keep_bytes = 1
    a.delete_old()
    assert [entry["id"] for entry in a.entries(9)] == [loop_id(2)]  # which runs
    with pytest.raises(ClvrError, match="no such image"):
        a.image(loop_id(1), 0)


def test_replicas_may_start_at_the_same_time(postgres_url, tmp_path):
    def start(number):
        store = SharedStore(postgres_url, str(tmp_path), f"r{number}", 60, 1e9, KEPT)
        store.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(start, range(6)))


def test_an_index_that_cannot_be_used_is_one_line_without_the_password(postgres_url, tmp_path):
    store = SharedStore(postgres_url, str(tmp_path), "a", 60, 1e9, KEPT)
    execute(store, "UPDATE clvr_index SET version = 9")
    wrong_password = postgres_url.replace(PASSWORD, "another-secret")
    for url, kind, message in [
        (postgres_url, ClvrError, "has version 9"),
        (postgres_url.replace("/test", "/absent"), ClvrError, "does not exist"),
        (wrong_password, ClvrError, "password authentication failed"),
        ("postgresql://u:secret@127.0.0.1:1/x", ClvrError, "refused"),
        ("mysql://u:secret@h/x", UsageError, "not mysql"),
        ("postgresql://u:secret@h:port/x", UsageError, "cannot be read"),
    ]:
        with pytest.raises(kind, match=message) as caught:
            SharedStore(url, str(tmp_path), "b", 60, 1e9, KEPT)
        said = str(caught.value)
        assert "\n" not in said
        assert PASSWORD not in said
        assert "secret" not in said
    execute(store, "DROP TABLE loops")
    with pytest.raises(IndexUnavailableError, match="does not exist"):
        store.entries(1)
    store.close()


def test_an_entry_that_names_a_path_deletes_nothing(postgres_url, tmp_path):
    store = SharedStore(postgres_url, str(tmp_path / "a"), "a", 60, -1.0, KEPT)
    accept(store, 1)
    trajectory().save(tmp_path / "secret")
    execute(store, "UPDATE loops SET id = '../secret', finished = 1, status = 'finished'")
    with pytest.raises(ClvrError, match="is no id of a loop"):
        store.delete_old()
    assert (tmp_path / "secret" / "trajectory.json").exists()
    with store._engine.connect() as connection:
        assert connection.execute(sql.text("SELECT count(*) FROM loops")).scalar() == 1
    store.close()


DAMAGE = [  # table, what is wrong, and what is said of it
    ("runs", "spec = '{'", "spec: not JSON"),
    ("runs", "spec = '{}'", "spec: lacks prompt"),
    ("runs", "spec = '[]'", "spec: expected a JSON object"),
    ("runs", "spec = repeat('x', 17000000)", "spec has 16,777,217 characters"),
    ("runs", "snapshot = repeat('[', 100000)", "snapshot: JSON with more than 64 levels"),
    ("runs", "images = -1", "images must be an integer"),
    ("runs", "started = 'NaN'", "started must be a finite number"),
    ("loops", "request = 'x'", "request: not JSON"),
    ("loops", "created = 'Infinity'", "created must be a finite number"),
]


def test_a_damaged_loop_is_listed_as_failed_when_its_replica_is_silent_and_others_are_taken_over(
    postgres_url, tmp_path
):
    a, b = (SharedStore(postgres_url, str(tmp_path), name, 60, 1e9, KEPT) for name in ("a", "b"))
    for number, (table, damage, _) in enumerate(DAMAGE):
        accept(a, number)
        execute(a, f"UPDATE {table} SET {damage} WHERE {'loop_id' if table == 'runs' else 'id'} = '{loop_id(number)}'")
    accept(a, 99)
    ids = [loop_id(number) for number in range(len(DAMAGE))]
    damage = {run.loop_id: run.damage for run in b.runs([*ids, loop_id(99)])}  # a may still run them
    assert damage.pop(loop_id(99)) is None
    expire(a)
    assert [run.loop_id for run in b.take_over(99)] == [loop_id(99)]
    entries = {entry["id"]: entry for entry in b.entries(99)}
    for each, (_, _, said) in zip(ids, DAMAGE, strict=True):
        assert said in damage[each]
        assert "\n" not in damage[each]
        assert entries[each]["status"] == "failed"
        assert said in entries[each]["error"]
    assert b.owners([*ids, loop_id(99)]) == {loop_id(99): "b"}
    for store in (a, b):
        store.close()


def test_damaged_events_and_commands_are_named_and_others_are_read(postgres_url, tmp_path):
    a, b = (SharedStore(postgres_url, str(tmp_path), name, 60, 1e9, KEPT) for name in ("a", "b"))
    for number in (1, 2):
        accept(a, number)
    execute(a, f"UPDATE events SET content = '[]' WHERE loop_id = '{loop_id(1)}'")
    with pytest.raises(DamagedRowError, match=f"{loop_id(1)}: a stored event: event: expected a JSON object"):
        b.events_after(loop_id(1), -1)
    assert b.events_after(loop_id(2), -1) == ([{"id": 0, "type": "queued"}], True)
    for name, kind, content in (
        ("unknown", "delete", "{}"),
        ("text", "plan", "x"),
        ("type", "plan", '{"requirements": "all", "instruction": null}'),
        ("range", "rollback", '{"step": -1}'),
    ):
        b.send(Command(name, loop_id(1), kind, {}))
        execute(a, f"UPDATE commands SET content = '{content}' WHERE id = '{name}'")
    b.send(Command("good", loop_id(1), "rollback", {"step": 0}))
    assert [command.id for command in a.commands()] == ["good"]
    for name in ("unknown", "text", "type", "range"):
        outcome = b.outcome(name)
        assert (outcome["status"], outcome["code"]) == (500, "damaged")
    execute(a, "UPDATE commands SET outcome = '{\"status\": 1}' WHERE id = 'good'")
    with pytest.raises(DamagedRowError, match="status must be an integer from 200 to 599"):
        b.outcome("good")
    for store in (a, b):
        store.close()
