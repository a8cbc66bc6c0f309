"""The store of loops: the files of each finished trajectory, and an index of all loops in SQLite.

    OUT/index.sqlite3
    OUT/loop_<24 hex digits>/trajectory.json, step_00.png, ..., index.html, events.json

A loop is in the index from the moment it is accepted. After the process died, the next start lists a loop whose
trajectory was saved as finished, and any other that was running as interrupted. Directories that the index does not
know are left alone. `SharedStore` of `shared.py` is the store of several replicas.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import DBAPIError

from clvr_jax.errors import ClvrError
from clvr_jax.files.file_names import refuse_url
from clvr_jax.files.image_io import decode_image
from clvr_jax.files.json_input import parse_json
from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from clvr_jax.serving.index.files import DirectoryFiles, LoopFiles
from clvr_jax.serving.index.records import CANCELED, FAILED, FINISHED, INTERRUPTED, RUNNING, NewLoop, Run
from clvr_jax.serving.index.rows import DamagedRowError, bounded, entry_from, event_from
from clvr_jax.serving.index.tables import LOOPS, open_sqlite, unavailable

_ID = re.compile(r"loop_[0-9a-f]{24}")
_SHOWN = [
    bounded(column) if column is LOOPS.c.request else column
    for column in LOOPS.c
    if column.name not in ("bytes", "folded")
]
_log = logging.getLogger("clvr.serving")


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
        try:
            files = DirectoryFiles(directory)
        except OSError as error:
            raise ClvrError(f"{directory}: cannot be written ({error.strerror}); choose another --out") from error
        self._set_up(open_sqlite(directory / "index.sqlite3"), files, keep_seconds, keep_bytes)
        self._recover()

    def _set_up(self, engine: sql.Engine, files: LoopFiles, keep_seconds: float, keep_bytes: float) -> None:
        self._engine, self._files = engine, files
        self._keep_seconds, self._keep_bytes = keep_seconds, keep_bytes
        # One connection of SQLite serves all threads.
        self._lock: AbstractContextManager[Any] = threading.RLock()

    @contextmanager
    def _transaction(self) -> Iterator[sql.Connection]:
        """Yields a connection whose changes are kept if the block succeeds. Raises: IndexUnavailableError."""
        try:
            with self._lock, self._engine.begin() as connection:
                yield connection
        except (DBAPIError, sql.exc.TimeoutError) as error:
            raise unavailable(error) from error

    def add(self, loop: NewLoop) -> None:
        """Lists a loop as running."""
        with self._transaction() as connection:
            self._insert(connection, loop)

    def _insert(self, connection: sql.Connection, loop: NewLoop) -> None:
        values = {
            "id": loop.id, "created": loop.created, "status": RUNNING, "mode": loop.mode,
            "prompt": self._text(loop.prompt), "model": loop.model, "seed": loop.seed,
            "request": json.dumps(dict(loop.request)), "folded": self._text(loop.prompt.casefold()),
        }  # fmt: skip
        connection.execute(sql.insert(LOOPS).values(values))

    def _text(self, text: str) -> str:
        """Returns a text as the index can hold it."""
        return text

    def finish(self, loop_id: str, status: str, trajectory: Trajectory, events: Sequence[Mapping[str, Any]]) -> None:
        """Saves the trajectory and the events of a loop, and lists it with this status."""
        content = json.dumps(list(events), indent=2, ensure_ascii=False).encode(errors="backslashreplace")
        size = self._files.write(loop_id, {"events.json": content, **trajectory.files()})
        self._list(loop_id, status, trajectory, size)
        try:
            self.delete_old()
        except ClvrError as error:  # of another loop, whose files or entry are damaged; this one is stored
            _log.warning("old loops cannot be deleted: %s", error)

    def fail(self, loop_id: str, error: str) -> None:
        """Lists a loop as failed."""
        self._end(loop_id, FAILED, error=self._text(error))

    def forget(self, loop_id: str) -> bool:
        """Deletes a loop that does not run; returns whether there was one."""
        with self._lock:
            with self._transaction() as connection:
                status = connection.execute(sql.select(LOOPS.c.status).where(LOOPS.c.id == loop_id)).scalar()
            if status is None or status == RUNNING:  # whatever else may be damaged
                return False
            self._delete(loop_id)
            return True

    def withdraw(self, loop_ids: Sequence[str]) -> None:
        """Removes loops that were listed but not accepted."""
        with self._transaction() as connection:
            connection.execute(sql.delete(LOOPS).where(LOOPS.c.id.in_(loop_ids)))

    def entry(self, loop_id: str) -> dict[str, Any] | None:
        """Returns what the index has about a loop; None if there is no such loop."""
        if not _ID.fullmatch(loop_id):
            return None
        with self._transaction() as connection:
            row = connection.execute(sql.select(*_SHOWN).where(LOOPS.c.id == loop_id)).one_or_none()
        return None if row is None else entry_from(row)

    def entries(self, limit: int, before: str | None = None, query: str = "") -> list[dict[str, Any]]:
        """Returns the latest loops, newest first.

        Args:
          limit: maximum number.
          before: id of a loop; only older ones are returned.
          query: words; only loops whose prompts contain all of them are returned, whatever their case.
        """
        found = sql.select(*_SHOWN).order_by(LOOPS.c.created.desc(), LOOPS.c.id.desc()).limit(limit)
        for word in query.split():
            found = found.where(LOOPS.c.folded.contains(self._text(word.casefold()), autoescape=True))
        with self._transaction() as connection:
            if before is not None:
                border = connection.execute(sql.select(LOOPS.c.created).where(LOOPS.c.id == before)).scalar()
                if border is None:
                    return []
                at_border = sql.and_(LOOPS.c.created == border, LOOPS.c.id < before)
                found = found.where(sql.or_(LOOPS.c.created < border, at_border))
            return [entry_from(row) for row in connection.execute(found)]

    def run(self, loop_id: str) -> Run | None:
        """Returns a running loop of any replica; None if it does not run, and if there are no replicas."""
        return next(iter(self.runs([loop_id])), None)

    def runs(self, loop_ids: Sequence[str]) -> list[Run]:
        """Returns those of the loops that run on some replica; [] if there are no replicas."""
        return []

    def image(self, loop_id: str, step: int) -> Any:
        """Returns the image of a step as (height, width, 3) uint8. Raises: ClvrError if there is none."""
        name = f"step_{step:02d}.png"
        content = self._files.read(loop_id, name) if _ID.fullmatch(loop_id) else None
        if content is None:
            raise ClvrError("no such image")
        return decode_image(content, f"{loop_id}/{name}")

    def local(self, loop_id: str) -> AbstractContextManager[Path]:
        """Returns a context with the directory of a stored loop on this machine. Raises: ClvrError if it is no id."""
        if not _ID.fullmatch(loop_id):
            raise ClvrError("no such loop")
        found: AbstractContextManager[Path] = self._files.local(loop_id)
        return found

    def trajectory(self, loop_id: str) -> Trajectory:
        """Reads a stored trajectory. Raises: ClvrError if there is none."""
        with self.local(loop_id) as directory:
            return Trajectory.load(directory)

    def events(self, loop_id: str) -> list[dict[str, Any]]:
        """Returns the events of a finished loop; [] if it has none. Raises: ClvrError if they are damaged."""
        content = self._files.read(loop_id, "events.json") if _ID.fullmatch(loop_id) else None
        if content is None:
            return []
        where = f"{loop_id}/events.json"
        found = parse_json(content, where)
        if not isinstance(found, list):
            raise DamagedRowError(f"{where}: is no list of events; delete the loop")
        return [event_from(event, where) for event in found]

    def delete_old(self) -> None:
        """Deletes loops by age, and the oldest ones while all together are too large."""
        oldest = time.time() - self._keep_seconds
        with self._lock:
            with self._transaction() as connection:
                deleted = list(connection.execute(sql.select(LOOPS.c.id).where(LOOPS.c.finished < oldest)).scalars())
                total = connection.execute(sql.select(sql.func.coalesce(sql.func.sum(LOOPS.c.bytes), 0))).scalar_one()
                if total > self._keep_bytes:
                    sizes = sql.select(LOOPS.c.id, LOOPS.c.bytes).where(LOOPS.c.bytes > 0)
                    for row in connection.execute(sizes.order_by(LOOPS.c.created, LOOPS.c.id)):
                        if total <= self._keep_bytes:
                            break
                        deleted.append(row.id)
                        total -= row.bytes
            for loop_id in deleted:
                self._delete(loop_id)

    def close(self) -> None:
        """Closes the index."""
        with self._lock:
            self._engine.dispose()

    def _list(self, loop_id: str, status: str, trajectory: Trajectory, size: int) -> None:
        """Lists a loop whose trajectory is saved and has `size` bytes."""
        images = len(trajectory.generated)
        error = None if trajectory.error is None else self._text(trajectory.error)
        self._end(loop_id, status, outcome=trajectory.outcome, best=trajectory.best, images=images, nfe=trajectory.nfe,
                  seconds=round(trajectory.seconds, 4), error=error, bytes=size)  # fmt: skip

    def _end(self, loop_id: str, status: str, **values: Any) -> None:
        with self._transaction() as connection:
            self._update(connection, loop_id, {**values, "status": status, "finished": time.time()})

    def _update(self, connection: sql.Connection, loop_id: str, values: Mapping[str, Any]) -> None:
        connection.execute(sql.update(LOOPS).where(LOOPS.c.id == loop_id).values(values))

    def _delete(self, loop_id: str) -> None:
        if not _ID.fullmatch(loop_id):  # becomes a path
            raise ClvrError(f"{loop_id!r:.60}: is no id of a loop; the index is damaged")
        self._files.delete(loop_id)
        with self._transaction() as connection:
            connection.execute(sql.delete(LOOPS).where(LOOPS.c.id == loop_id))

    def _recover(self) -> None:
        """Lists the loops of a process that died, and removes what it had not finished to write of them."""
        with self._transaction() as connection:
            running = list(connection.execute(sql.select(LOOPS.c.id).where(LOOPS.c.status == RUNNING)).scalars())
        for loop_id in running:
            try:
                trajectory = self.trajectory(loop_id)
            except ClvrError:
                self._end(loop_id, INTERRUPTED)
                self._files.delete(loop_id)
            else:
                with self.local(loop_id) as directory:
                    size = sum(path.stat().st_size for path in directory.iterdir())
                self._list(loop_id, CANCELED if trajectory.outcome == CANCELED else FINISHED, trajectory, size)
        self.delete_old()
