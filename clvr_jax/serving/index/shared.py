"""The store of several replicas: PostgreSQL has the index, leases, events and commands; a shared place has the files.

The replica that accepts a loop owns it: it holds a lease, which it renews while it lives. When the lease has expired,
another replica takes the loop over and resumes it from its last snapshot. Only the owner may finish a loop, so a
replica that was cut off from the database cannot overwrite what another one made meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_json
from clvr_jax.files.image_io import ImageLike, decode_image
from clvr_jax.files.json_input import JsonObject
from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from clvr_jax.serving.index.files import open_files
from clvr_jax.serving.index.records import Command, NewLoop, Progress, Run
from clvr_jax.serving.index.rows import DamagedRowError, bounded, command_from, event_from, outcome_from, run_from
from clvr_jax.serving.index.store import LoopStore
from clvr_jax.serving.index.tables import COMMANDS, EVENTS, LOOPS, RUNS, open_postgresql

_NOW = sql.func.date_part("epoch", sql.func.clock_timestamp())
"""Seconds of the database's clock, which all replicas share."""

_KEEP_COMMANDS_SECONDS = 3600.0
_log = logging.getLogger("clvr.serving")


class LostLeaseError(ClvrError):
    """Another replica has taken over the loop."""


class SharedStore(LoopStore):
    """Stores the loops of several replicas; any thread may call it.

    Args:
      url: of the database, see `open_postgresql`.
      place: a directory that all replicas have, or the URL of a bucket.
      replica: name of this replica, unlike those of all others.
      lease_seconds: after which a loop whose owner is silent is taken over.
      keep_seconds, keep_bytes: see `LoopStore`.
    Raises: ClvrError; UsageError for an invalid URL.
    """

    def __init__(
        self, url: str, place: str, replica: str, lease_seconds: float, keep_seconds: float, keep_bytes: float
    ):
        files = open_files(place)
        self.replica, self.lease_seconds = replica, lease_seconds
        self._set_up(open_postgresql(url), files, keep_seconds, keep_bytes)
        self._lock = contextlib.nullcontext()  # the database orders what happens
        self.delete_old()

    # --- loops

    def accept(self, loop: NewLoop, spec: Mapping[str, Any], progress: Progress) -> None:
        """Lists a loop as running here, with all that another replica needs to run it."""
        for name, content in progress.files.items():
            self._files.add(loop.id, name, content)
        with self._transaction() as connection:
            self._insert(connection, loop)
            run = {
                "loop_id": loop.id, "owner": self.replica, "expires": _NOW + self.lease_seconds,
                "spec": json.dumps(spec), **_columns(progress),
            }  # fmt: skip
            connection.execute(sql.insert(RUNS).values(run))
            self._add_events(connection, loop.id, progress.events)

    def save(self, loop_id: str, progress: Progress) -> None:
        """Stores the state of a loop of this replica. Raises: LostLeaseError."""
        for name, content in progress.files.items():
            self._files.add(loop_id, name, content)
        with self._transaction() as connection:
            self._update_run(connection, loop_id, **_columns(progress))
            self._add_events(connection, loop_id, progress.events)

    def finish(self, loop_id: str, status: str, trajectory: Trajectory, events: Sequence[Mapping[str, Any]]) -> None:
        """See `LoopStore`. Raises: LostLeaseError if another replica has taken over the loop."""
        with self._transaction() as connection:
            self._update_run(connection, loop_id, expires=_NOW + self.lease_seconds)
        super().finish(loop_id, status, trajectory, events)

    def withdraw(self, loop_ids: Sequence[str]) -> None:
        """See `LoopStore`."""
        with self._transaction() as connection:
            for loop_id in loop_ids:
                self._remove_run(connection, loop_id)
            connection.execute(sql.delete(LOOPS).where(LOOPS.c.id.in_(loop_ids)))
        for loop_id in loop_ids:
            self._files.delete(loop_id)

    def runs(self, loop_ids: Sequence[str]) -> list[Run]:
        """See `LoopStore`."""
        with self._transaction() as connection:
            columns = [bounded(each) if each.name in ("spec", "snapshot") else each for each in RUNS.c]
            found = sql.select(*columns, LOOPS.c.created, bounded(LOOPS.c.request))
            found = found.join(LOOPS, LOOPS.c.id == RUNS.c.loop_id).where(RUNS.c.loop_id.in_(loop_ids))
            return [run_from(row) for row in connection.execute(found)]

    def running_trajectory(self, run: Run) -> Trajectory | None:
        """Returns the steps so far of a running loop, with an outcome that means nothing; None if it has none.

        Raises: ClvrError if they are damaged, or an image is missing.
        """
        if run.snapshot is None:
            return None
        with self.local(run.loop_id) as directory:
            return load_snapshot(JsonObject(run.snapshot, f"{run.loop_id}: the snapshot"), directory)

    def given_images(self, loop_id: str, count: int) -> tuple[ImageLike, ...]:
        """Returns the user's own images of a running loop. Raises: ClvrError if one is missing."""
        images: list[ImageLike] = []
        for number in range(count):
            name = f"given_{number:02d}.png"
            content = self._files.read(loop_id, name)
            if content is None:
                raise ClvrError(f"{loop_id}: lacks the image {name} that it starts from")
            images.append(decode_image(content, f"{loop_id}/{name}"))
        return tuple(images)

    def events_after(self, loop_id: str, after: int) -> tuple[list[dict[str, Any]], bool]:
        """Returns the events of a loop with an id above `after`, and whether it runs on some replica.

        Raises: ClvrError if one is damaged.
        """
        with self._transaction() as connection:
            is_running = connection.execute(sql.select(RUNS.c.loop_id).where(RUNS.c.loop_id == loop_id)).first()
            found = sql.select(bounded(EVENTS.c.content)).where(EVENTS.c.loop_id == loop_id, EVENTS.c.id > after)
            texts = list(connection.execute(found.order_by(EVENTS.c.id)).scalars())
        events = [event_from(text, f"{loop_id}: a stored event") for text in texts]
        if is_running is None and not events:
            events = [event for event in self.events(loop_id) if event["id"] > after]
        return events, is_running is not None

    def delete_old(self) -> None:
        """See `LoopStore`; also deletes answers to commands that nobody waits for any more."""
        super().delete_old()
        with self._transaction() as connection:
            connection.execute(sql.delete(COMMANDS).where(COMMANDS.c.created < time.time() - _KEEP_COMMANDS_SECONDS))

    # --- leases

    def owners(self, loop_ids: Sequence[str]) -> dict[str, str | None]:
        """Returns the replicas that run loops, None where none does now; loops that have ended are not in it."""
        with self._transaction() as connection:
            found = sql.select(RUNS.c.loop_id, RUNS.c.owner).where(RUNS.c.loop_id.in_(loop_ids))
            return {row.loop_id: row.owner for row in connection.execute(found)}

    def renew(self) -> set[str]:
        """Renews the leases of this replica; returns the loops that it owns."""
        with self._transaction() as connection:
            renewed = sql.update(RUNS).where(RUNS.c.owner == self.replica)
            renewed = renewed.values(expires=_NOW + self.lease_seconds).returning(RUNS.c.loop_id)
            return set(connection.execute(renewed).scalars())

    def take_over(self, limit: int) -> list[Run]:
        """Takes over at most `limit` loops of others whose leases have expired, the oldest first.

        No two replicas take the same one. Those of this replica are renewed instead. A loop whose row is damaged is
        listed as failed.
        """
        with self._transaction() as connection:
            expired = sql.select(RUNS.c.loop_id).join(LOOPS, LOOPS.c.id == RUNS.c.loop_id)
            expired = expired.where(RUNS.c.owner.is_distinct_from(self.replica), RUNS.c.expires < _NOW)
            expired = expired.order_by(LOOPS.c.created).limit(limit)
            found = list(connection.execute(expired.with_for_update(of=RUNS, skip_locked=True)).scalars())
            if not found:
                return []
            taken = sql.update(RUNS).where(RUNS.c.loop_id.in_(found))
            values = {"owner": self.replica, "expires": _NOW + self.lease_seconds}
            # What was handed back is resumed by plan; a loop whose owners died one after the other may be the reason.
            times = sql.case((RUNS.c.owner.is_(None), RUNS.c.resumptions), else_=RUNS.c.resumptions + 1)
            connection.execute(taken.values({**values, "resumptions": times}))
        runs = self.runs(found)
        for run in runs:
            if run.damage is not None:
                _log.warning("%s", run.damage)
                self.fail(run.loop_id, run.damage)
        return sorted((run for run in runs if run.damage is None), key=lambda run: run.created)

    def hand_back(self, loop_id: str) -> None:
        """Gives up the lease of a loop of this replica, so that another one resumes it at once."""
        with self._transaction() as connection:
            self._update_run(connection, loop_id, owner=None, expires=0.0)

    def postpone(self, loop_id: str, error: str) -> None:
        """Gives up a loop that cannot be resumed now; a replica tries again after a lease. It counts as a failure."""
        with self._transaction() as connection:
            self._update(connection, loop_id, {"error": self._text(error)})
            later = _NOW + self.lease_seconds
            self._update_run(connection, loop_id, owner=None, expires=later, resumptions=RUNS.c.resumptions + 1)

    # --- commands

    def send(self, command: Command) -> None:
        """Stores a command for the replica that runs the loop."""
        values = {"id": command.id, "loop_id": command.loop_id, "kind": command.kind, "created": time.time(),
                  "content": json.dumps(command.content)}  # fmt: skip
        with self._transaction() as connection:
            connection.execute(sql.insert(COMMANDS).values(values))

    def commands(self) -> list[Command]:
        """Returns the commands, oldest first, for loops of this replica that were not carried out.

        A damaged one is answered with that.
        """
        commands, damaged = [], {}
        with self._transaction() as connection:
            columns = [bounded(each) if each is COMMANDS.c.content else each for each in COMMANDS.c]
            found = sql.select(*columns).join(RUNS, RUNS.c.loop_id == COMMANDS.c.loop_id)
            found = found.where(RUNS.c.owner == self.replica, COMMANDS.c.outcome.is_(None))
            for row in connection.execute(found.order_by(COMMANDS.c.created)):
                try:
                    commands.append(command_from(row))
                except DamagedRowError as error:
                    damaged[row.id] = str(error)
        for command_id, message in damaged.items():
            self.answer(command_id, {"status": 500, "message": message, "code": "damaged"})
        return commands

    def answer(self, command_id: str, outcome: Mapping[str, Any]) -> None:
        """Stores what a command has led to."""
        with self._transaction() as connection:
            found = sql.update(COMMANDS).where(COMMANDS.c.id == command_id)
            connection.execute(found.values(outcome=json.dumps(outcome)))

    def outcome(self, command_id: str) -> dict[str, Any] | None:
        """Returns what a command has led to; None if it was not carried out. Raises: ClvrError if that is damaged."""
        with self._transaction() as connection:
            found = sql.select(COMMANDS.c.loop_id, bounded(COMMANDS.c.outcome)).where(COMMANDS.c.id == command_id)
            row = connection.execute(found).one_or_none()
        return None if row is None or row.outcome is None else outcome_from(row.outcome, row.loop_id)

    def retract(self, command_id: str) -> None:
        """Deletes a command."""
        with self._transaction() as connection:
            connection.execute(sql.delete(COMMANDS).where(COMMANDS.c.id == command_id))

    # --- inside

    def _text(self, text: str) -> str:
        return text.replace("\0", "\N{REPLACEMENT CHARACTER}")  # PostgreSQL's texts have no NUL

    def _end(self, loop_id: str, status: str, **values: Any) -> None:
        with self._transaction() as connection:
            owned = sql.delete(RUNS).where(RUNS.c.loop_id == loop_id, RUNS.c.owner == self.replica)
            if connection.execute(owned).rowcount != 1:
                raise LostLeaseError(f"{loop_id}: another replica runs this loop")
            self._remove_run(connection, loop_id)
            self._update(connection, loop_id, {**values, "status": status, "finished": time.time()})

    def _update_run(self, connection: sql.Connection, loop_id: str, **values: Any) -> None:
        owned = sql.update(RUNS).where(RUNS.c.loop_id == loop_id, RUNS.c.owner == self.replica)
        if connection.execute(owned.values(values)).rowcount != 1:
            raise LostLeaseError(f"{loop_id}: another replica runs this loop")

    def _remove_run(self, connection: sql.Connection, loop_id: str) -> None:
        connection.execute(sql.delete(RUNS).where(RUNS.c.loop_id == loop_id))
        connection.execute(sql.delete(EVENTS).where(EVENTS.c.loop_id == loop_id))
        # What was answered is deleted by the replica that waits for it, or by age.
        unanswered = sql.delete(COMMANDS).where(COMMANDS.c.loop_id == loop_id, COMMANDS.c.outcome.is_(None))
        connection.execute(unanswered)

    def _add_events(self, connection: sql.Connection, loop_id: str, events: Sequence[Mapping[str, Any]]) -> None:
        rows = [{"loop_id": loop_id, "id": event["id"], "content": json.dumps(event)} for event in events]
        if rows:
            connection.execute(sql.insert(EVENTS), rows)


def load_snapshot(snapshot: JsonObject, directory: Path) -> Trajectory:
    """Reads the steps of a snapshot, whose images are in a directory. Raises: ClvrError."""
    with tempfile.TemporaryDirectory(prefix="clvr-snapshot-") as place:
        for path in directory.glob("*.png"):
            (Path(place) / path.name).write_bytes(path.read_bytes())
        write_json(Path(place) / "trajectory.json", snapshot.nested("trajectory").content)
        try:
            return Trajectory.load(place)
        except ClvrError as error:  # names a temporary file
            raise ClvrError(f"{snapshot.where}: {str(error).replace(f'{place}/', '')}") from error


def _columns(progress: Progress) -> dict[str, Any]:
    snapshot = None if progress.snapshot is None else json.dumps(progress.snapshot)
    return {"started": progress.started, "images": progress.images, "best": progress.best, "snapshot": snapshot}
