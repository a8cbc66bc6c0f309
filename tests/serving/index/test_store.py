import json
import os
import sqlite3

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import Step, Trajectory
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN
from clvr_jax.serving.index.records import NewLoop
from clvr_jax.serving.index.store import LoopStore
from tests.reasoning.scripted import picture


def loop_id(number: int) -> str:
    return f"loop_{number:024x}"


def trajectory(value: int = 7) -> Trajectory:
    return Trajectory("p", (Step("Draw.", IMAGE_GEN, image=picture(value), nfe=4),), "unverified")


def alter(directory, *statements):
    """Changes the index behind the store."""
    with sqlite3.connect(directory / "index.sqlite3") as connection:
        connection.create_function("casefold", 1, str.casefold)
        for statement in statements:
            connection.execute(statement)
    connection.close()


def add(store, number, finish=True):
    store.add(NewLoop(loop_id(number), float(number), "loop", "p", "m", 0, {"user": "u"}))
    if finish:
        store.finish(loop_id(number), "finished", trajectory(number), [{"id": 0, "type": "done"}])


def states(store):
    return {entry["id"]: entry["status"] for entry in store.entries(100)}


def test_finished_loops_survive_and_running_ones_are_interrupted(tmp_path):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    add(store, 1)
    add(store, 2, finish=False)
    add(store, 3, finish=False)
    trajectory(3).save(tmp_path / loop_id(3))  # saved, but killed before the index had it
    (tmp_path / f".{loop_id(2)}.part").mkdir()
    others = [tmp_path / loop_id(9), tmp_path / f"copy_of_{loop_id(1)}"]
    for path in others:
        trajectory().save(path)
    # Not closed: as after kill -9.
    again = LoopStore(tmp_path, 1e9, 1 << 30)
    assert states(again) == {loop_id(1): "finished", loop_id(2): "interrupted", loop_id(3): "finished"}
    assert [again.trajectory(loop_id(number)).image[0, 0, 0] for number in (1, 3)] == [1, 3]
    assert (again.entry(loop_id(3))["nfe"], again.events(loop_id(3))) == (4, [])
    assert all((path / "trajectory.json").exists() for path in others)
    assert again.events(loop_id(1)) == [{"id": 0, "type": "done"}]
    assert (again.entry(loop_id(1))["request"], again.entry(loop_id(1))["nfe"]) == ({"user": "u"}, 4)
    assert not list(tmp_path.glob(f"*{loop_id(2)}*"))
    (tmp_path / loop_id(1) / "events.json").write_text("{")
    with pytest.raises(ClvrError, match="events"):
        again.events(loop_id(1))
    assert again.forget(loop_id(2))
    assert not again.forget(loop_id(2))


def test_pages_are_newest_first(tmp_path):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    for number in range(5):
        add(store, number, finish=False)
    assert [entry["id"] for entry in store.entries(2)] == [loop_id(4), loop_id(3)]
    assert [entry["id"] for entry in store.entries(9, before=loop_id(3))] == [loop_id(2), loop_id(1), loop_id(0)]
    assert not store.forget(loop_id(0))  # it runs
    store.withdraw([loop_id(0), loop_id(1)])
    assert len(store.entries(9)) == 3


def test_the_oldest_are_deleted_by_size_and_all_by_age(tmp_path):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    for number in range(4):
        add(store, number)
    each = sum(file.stat().st_size for file in (tmp_path / loop_id(3)).iterdir())
    kept = LoopStore(tmp_path, 1e9, int(2.5 * each))
    assert sorted(states(kept)) == [loop_id(2), loop_id(3)]
    assert sorted(path.name for path in tmp_path.glob("loop_*")) == [loop_id(2), loop_id(3)]
    assert states(LoopStore(tmp_path, -1.0, 1 << 30)) == {}


def test_no_path_leads_out_of_the_directory(tmp_path):
    store = LoopStore(tmp_path / "a", 1e9, 1 << 30)
    trajectory().save(tmp_path / "secret")
    for name in ("../secret", "loop_0/../../secret", ""):
        with pytest.raises(ClvrError, match="no such"):
            store.trajectory(name)
        with pytest.raises(ClvrError, match="no such"):
            store.image(name, 0)
        assert store.events(name) == []


DAMAGE = [
    "id = '../../etc'", "id = '*'", "id = ''", "id = 'loop_' || upper(hex(zeroblob(12))) || 'g'", "id = x'6c'",
    "bytes = 'x'", "request = '{'", "request = x'ff'", "created = 'x'", "finished = 'x'", "seed = 'x'", "images = 'x'",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_names_a_path_or_other_types_deletes_nothing(tmp_path, damage):
    store = LoopStore(tmp_path / "a", 1e9, 1 << 30)
    add(store, 1, finish=False)
    store.close()
    alter(
        tmp_path / "a",
        "DROP INDEX loops_by_age",
        "ALTER TABLE loops RENAME TO old",
        "CREATE TABLE loops AS SELECT * FROM old",
        f"UPDATE loops SET {damage}",
    )
    trajectory().save(tmp_path / "a" / loop_id(9))
    before = sorted(tmp_path.rglob("*.png"))
    with pytest.raises(ClvrError, match=r"index.sqlite3: the entry of loop .* is damaged"):
        LoopStore(tmp_path / "a", -1.0, 0)
    assert sorted(tmp_path.rglob("*.png")) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("request = '{'", "request: not JSON"),
        ("request = '[]'", "request: expected a JSON object"),
        ("request = '{\"seed\": NaN}'", "request: has a number that is not finite"),
        ('request = \'{"user": "\\ud800"}\'', "lone surrogate"),
        ("request = printf('\"%*c\"', 17000000, 'x')", "request has 16,777,217 characters"),
        ("created = 9e999", "created must be a finite number"),
        ("status = 'done'", "status must be one of"),
        ("best = -1", "best must be an integer"),
        ("seed = 'x'", "seed must be an integer"),
    ],
)
def test_an_entry_that_is_damaged_later_is_listed_as_failed_beside_others(tmp_path, damage, said):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    for number in (1, 2):
        add(store, number)
    alter(tmp_path, f"UPDATE loops SET {damage} WHERE id = '{loop_id(1)}'")
    found = {entry["id"]: entry for entry in store.entries(9)}
    assert (found[loop_id(2)]["status"], found[loop_id(2)]["error"]) == ("finished", None)
    damaged = store.entry(loop_id(1))
    assert damaged == found[loop_id(1)]
    assert (damaged["status"], damaged["prompt"], damaged["nfe"]) == ("failed", "p", 4)
    assert said in damaged["error"]
    assert damaged["error"].startswith(f"the entry of loop {loop_id(1)}: ")
    assert damaged["error"].endswith("; delete the loop")
    assert "\n" not in damaged["error"]
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    assert store.forget(loop_id(1))
    assert list(states(store)) == [loop_id(2)]


@pytest.mark.parametrize("content", ["{", "{}", "[5]", '[{"id": "0", "type": "done"}]', '[{"id": 0}]'])
def test_events_that_are_damaged_are_one_line(tmp_path, content):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    add(store, 1)
    (tmp_path / loop_id(1) / "events.json").write_text(content)
    with pytest.raises(ClvrError, match=r"^loop_\w+/events.json: [^\n]+$"):
        store.events(loop_id(1))


def test_an_old_loop_that_cannot_be_deleted_does_not_keep_another_one_from_being_stored(tmp_path, caplog):
    store = LoopStore(tmp_path, 1e9, 0)
    add(store, 1, finish=False)
    alter(tmp_path, "UPDATE loops SET id = '../x', bytes = 1, status = 'finished'")
    add(store, 2)
    assert states(store)[loop_id(2)] == "finished"
    assert "old loops cannot be deleted: '../x': is no id of a loop" in caplog.text


def test_a_text_that_is_not_utf8_is_shown_with_marks(tmp_path):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    add(store, 1, finish=False)
    alter(tmp_path, "UPDATE loops SET prompt = CAST(x'61ff' AS TEXT)")
    assert [entry["prompt"] for entry in store.entries(9)] == ["a\ufffd"]


def test_what_is_no_index_is_one_line(tmp_path):
    index = tmp_path / "index.sqlite3"
    os.mkfifo(index)
    with pytest.raises(ClvrError, match="is not a file"):
        LoopStore(tmp_path, 1e9, 1 << 30)
    index.unlink()
    index.write_bytes(b"x" * 5000)
    with pytest.raises(ClvrError, match="file is not a database"):
        LoopStore(tmp_path, 1e9, 1 << 30)


def test_an_index_of_another_version_is_refused(tmp_path):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    store.close()
    alter(tmp_path, "PRAGMA user_version = 9")
    with pytest.raises(ClvrError, match="has version 9"):
        LoopStore(tmp_path, 1e9, 1 << 30)


def test_an_index_of_version_1_is_searched_like_a_new_one(tmp_path):
    store = LoopStore(tmp_path, 1e9, 1 << 30)
    store.add(NewLoop(loop_id(1), 1.0, "loop", "Ein GRÜNES Rechteck, 50% groß", "m", 0, {}))
    store.close()
    alter(tmp_path, "ALTER TABLE loops DROP COLUMN folded", "PRAGMA user_version = 1")
    again = LoopStore(tmp_path, 1e9, 1 << 30)
    for query, found in [("grünes 50%", 1), ("GROSS", 1), ("5_%", 0), ("blau", 0)]:
        assert len(again.entries(9, query=query)) == found
