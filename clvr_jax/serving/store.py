"""The store of loops: a directory for each finished trajectory, and an SQLite index of all loops.

    OUT/index.sqlite3
    OUT/loop_<24 hex digits>/trajectory.json, step_00.png, ..., index.html, events.json

A loop is in the index from the moment it is accepted. After the process died, the next start lists a loop whose
trajectory was saved as finished, and any other that was running as interrupted. Directories that the index does not
know are left alone.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clvr_jax.atomic_io import refuse_url, write_json
from clvr_jax.errors import ClvrError
from clvr_jax.image_io import read_image
from clvr_jax.json_input import parse_json, read_text
from clvr_jax.reasoning.trajectory import Trajectory

RUNNING, FINISHED, FAILED, CANCELED, INTERRUPTED = "running", "finished", "failed", "canceled", "interrupted"
_ID = re.compile(r"loop_[0-9a-f]{24}")
_DAMAGED = """
SELECT id FROM loops WHERE typeof(id) <> 'text' OR length(id) <> 29 OR id NOT GLOB 'loop_*'
    OR id GLOB 'loop_*[^0-9a-f]*'
    OR typeof(created) <> 'real' OR typeof(finished) NOT IN ('real', 'null') OR typeof(status) <> 'text'
    OR typeof(mode) <> 'text' OR typeof(prompt) <> 'text' OR typeof(model) <> 'text' OR typeof(seed) <> 'integer'
    OR typeof(best) NOT IN ('integer', 'null') OR typeof(images) NOT IN ('integer', 'null')
    OR typeof(bytes) <> 'integer' OR NOT json_valid(request) LIMIT 1
"""
"""Finds an entry that this program has not written; an id becomes a path of what is deleted."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS loops (
    id TEXT PRIMARY KEY,
    created REAL NOT NULL,
    finished REAL,
    status TEXT NOT NULL,
    mode TEXT NOT NULL,
    prompt TEXT NOT NULL,
    model TEXT NOT NULL,
    seed INTEGER NOT NULL,
    request TEXT NOT NULL,
    outcome TEXT,
    best INTEGER,
    images INTEGER,
    nfe INTEGER,
    seconds REAL,
    error TEXT,
    bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS loops_by_age ON loops (created, id);
"""
_VERSION = 1
"""Of the schema, in SQLite's user_version."""
_SHOWN = "id, created, finished, status, mode, prompt, model, seed, request, outcome, best, images, nfe, seconds, error"


class LoopStore:
    """Stores loops below a directory; any thread may call it.

    Args:
      directory: is created if needed. Its lock is the caller's.
      keep_seconds: age at which a loop is deleted.
      keep_bytes: total size of all trajectories; above it the oldest are deleted.
    Raises: ClvrError if the directory or the index cannot be written, or is of another version.
    """

    def __init__(self, directory: Path, keep_seconds: float, keep_bytes: float):
        refuse_url(directory)
        self._directory, self._keep_seconds, self._keep_bytes = directory, keep_seconds, keep_bytes
        self._lock = threading.RLock()
        path = directory / "index.sqlite3"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # SQLite would wait for a pipe
                raise ClvrError(f"{path}: is not a file; choose another --out")
            self._index = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._index.row_factory = sqlite3.Row
            self._index.text_factory = lambda content: content.decode(errors="replace")
            self._index.create_function("casefold", 1, str.casefold, deterministic=True)  # SQLite knows ASCII only
            version = self._index.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise ClvrError(f"{path}: has version {version}, this program reads version {_VERSION}")
            # The write-ahead log survives kill -9 of the process; full durability would cost a disk flush per loop.
            self._index.execute("PRAGMA journal_mode = WAL")
            self._index.execute("PRAGMA synchronous = NORMAL")
            self._index.executescript(_SCHEMA)
            self._index.execute(f"PRAGMA user_version = {_VERSION}")
            for row in self._index.execute(_DAMAGED):
                raise ClvrError(f"{path}: the entry of loop {row['id']!r:.60} is damaged; choose another --out")
            self._recover()
        except (OSError, sqlite3.Error) as error:
            raise ClvrError(f"{path}: cannot be written ({error}); choose another --out") from error

    def add(
        self, loop_id: str, created: float, mode: str, prompt: str, model: str, seed: int, request: Mapping[str, Any]
    ) -> None:
        """Lists a loop as running."""
        with self._lock:
            self._index.execute(
                "INSERT INTO loops (id, created, status, mode, prompt, model, seed, request) VALUES (?,?,?,?,?,?,?,?)",
                (loop_id, created, RUNNING, mode, prompt, model, seed, json.dumps(dict(request))),
            )

    def finish(self, loop_id: str, status: str, trajectory: Trajectory, events: Sequence[Mapping[str, Any]]) -> None:
        """Saves the trajectory and the events of a loop, and lists it with this status."""
        directory = self._directory / loop_id
        trajectory.save(directory)
        write_json(directory / "events.json", list(events))
        self._list(loop_id, status, trajectory)
        self.delete_old()

    def fail(self, loop_id: str, error: str) -> None:
        """Lists a loop as failed."""
        self._end(loop_id, FAILED, error=error)

    def forget(self, loop_id: str) -> bool:
        """Deletes a loop that does not run; returns whether there was one."""
        with self._lock:
            row = self.entry(loop_id)
            if row is None or row["status"] == RUNNING:
                return False
            self._delete(loop_id)
            return True

    def withdraw(self, loop_ids: Sequence[str]) -> None:
        """Removes loops that were listed but not accepted."""
        with self._lock:
            self._index.executemany("DELETE FROM loops WHERE id = ?", [(each,) for each in loop_ids])

    def entry(self, loop_id: str) -> dict[str, Any] | None:
        """Returns what the index has about a loop; None if there is no such loop."""
        with self._lock:
            row = self._index.execute(f"SELECT {_SHOWN} FROM loops WHERE id = ?", (loop_id,)).fetchone()  # noqa: S608
        return None if row is None else _entry(row)

    def entries(self, limit: int, before: str | None = None, query: str = "") -> list[dict[str, Any]]:
        """Returns the latest loops, newest first.

        Args:
          limit: maximum number.
          before: id of a loop; only older ones are returned.
          query: words; only loops whose prompts contain all of them are returned, whatever their case.
        """
        with self._lock:
            values = [word.casefold() for word in query.split()]
            conditions = ["instr(casefold(prompt), ?)" for _ in values]
            if before is not None:
                conditions.append("(created, id) < (SELECT created, id FROM loops WHERE id = ?)")
                values.append(before)
            where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
            rows = self._index.execute(
                f"SELECT {_SHOWN} FROM loops {where} ORDER BY created DESC, id DESC LIMIT ?",  # noqa: S608 - constants
                (*values, limit),
            ).fetchall()
        return [_entry(row) for row in rows]

    def image(self, loop_id: str, step: int) -> Any:
        """Returns the image of a step as (height, width, 3) uint8. Raises: ClvrError if there is none."""
        if not _ID.fullmatch(loop_id):
            raise ClvrError("no such image")
        return read_image(self._directory / loop_id / f"step_{step:02d}.png")

    def directory(self, loop_id: str) -> Path:
        """Returns the directory of a stored loop. Raises: ClvrError for what is no id."""
        if not _ID.fullmatch(loop_id):
            raise ClvrError("no such loop")
        return self._directory / loop_id

    def trajectory(self, loop_id: str) -> Trajectory:
        """Reads a stored trajectory. Raises: ClvrError if there is none."""
        if not _ID.fullmatch(loop_id):
            raise ClvrError("no such loop")
        return Trajectory.load(self._directory / loop_id)

    def events(self, loop_id: str) -> list[dict[str, Any]]:
        """Returns the events of a finished loop; [] if it has none."""
        path = self._directory / loop_id / "events.json"
        if not _ID.fullmatch(loop_id) or not path.is_file():
            return []
        found = parse_json(read_text(path), str(path))
        if not isinstance(found, list) or not all(isinstance(event, dict) and "type" in event for event in found):
            raise ClvrError(f"{path}: is no list of events; the file is damaged, delete the loop")
        return [dict(event) for event in found]

    def delete_old(self) -> None:
        """Deletes loops by age, and the oldest ones while all together are too large."""
        with self._lock:
            oldest = time.time() - self._keep_seconds
            rows = self._index.execute(
                "SELECT id FROM loops WHERE finished IS NOT NULL AND finished < ?", (oldest,)
            ).fetchall()
            total = self._index.execute("SELECT COALESCE(SUM(bytes), 0) FROM loops").fetchone()[0]
            if total > self._keep_bytes:
                for row in self._index.execute("SELECT id, bytes FROM loops WHERE bytes > 0 ORDER BY created, id"):
                    if total <= self._keep_bytes:
                        break
                    rows.append(row)
                    total -= row["bytes"]
            for row in rows:
                self._delete(row["id"])

    def close(self) -> None:
        """Closes the index."""
        with self._lock:
            self._index.close()

    def _list(self, loop_id: str, status: str, trajectory: Trajectory) -> None:
        """Lists a loop whose trajectory is saved."""
        size = sum(file.stat().st_size for file in (self._directory / loop_id).iterdir())
        images = len(trajectory.generated)
        self._end(loop_id, status, outcome=trajectory.outcome, best=trajectory.best, images=images, nfe=trajectory.nfe,
                  seconds=round(trajectory.seconds, 4), error=trajectory.error, bytes=size)  # fmt: skip

    def _end(self, loop_id: str, status: str, **values: Any) -> None:
        values |= {"status": status, "finished": time.time()}
        names = ", ".join(f"{name} = :{name}" for name in values)  # names of this module, never of a client
        with self._lock:
            self._index.execute(f"UPDATE loops SET {names} WHERE id = :id", {**values, "id": loop_id})  # noqa: S608

    def _delete(self, loop_id: str) -> None:
        shutil.rmtree(self._directory / loop_id, ignore_errors=True)
        self._index.execute("DELETE FROM loops WHERE id = ?", (loop_id,))

    def _recover(self) -> None:
        """Lists the loops of a process that died, and removes what it had not finished to write of them."""
        for row in self._index.execute("SELECT id FROM loops WHERE status = ?", (RUNNING,)).fetchall():
            try:
                trajectory = self.trajectory(row["id"])
            except ClvrError:
                self._end(row["id"], INTERRUPTED)
                for path in self._directory.glob(f"*{row['id']}*"):
                    shutil.rmtree(path, ignore_errors=True)
            else:
                self._list(row["id"], CANCELED if trajectory.outcome == CANCELED else FINISHED, trajectory)
        self.delete_old()


def _entry(row: sqlite3.Row) -> dict[str, Any]:
    return {**dict(row), "request": json.loads(row["request"])}
