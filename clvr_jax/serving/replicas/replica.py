"""One of several replicas: keeps the leases of its loops, saves their progress, resumes those of dead replicas, and
carries out what users asked for at another one."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.loop.editable import EditablePromptState
from clvr_jax.reasoning.trajectories.edits import EditError
from clvr_jax.reasoning.trajectories.trajectory import CANCELED, STOPPED
from clvr_jax.serving.errors import NO_IMAGE, message_of
from clvr_jax.serving.event_log import Event, EventLog
from clvr_jax.serving.index.records import Command, Progress, Run
from clvr_jax.serving.index.rows import DamagedRowError
from clvr_jax.serving.index.shared import LostLeaseError, SharedStore
from clvr_jax.serving.index.tables import IndexUnavailableError
from clvr_jax.serving.jobs import INTERRUPTED, LoopJob, LoopSpec
from clvr_jax.serving.replicas.specs import capture, given_files, restore, spec_to_json
from clvr_jax.serving.scheduling.scheduler import DrainingError, EndedError, QueueFullError

if TYPE_CHECKING:
    from clvr_jax.serving.service import Service

MAX_RESUMPTIONS = 3
"""A loop is listed as failed when more replicas than these died, maybe because of it, or could not resume it."""
EVENT_GAP = 100_000
"""Ids that the events of a resumed loop leave out. Clients of the replica that died may have received events that it
had not stored yet; ids are above theirs from then on, so a client that reconnects misses nothing."""
_POLL_SECONDS = 0.5
_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
_log = logging.getLogger("clvr.serving")


class Replica:
    """What a service does to share its loops with others.

    Args:
      service: of this replica.
      store: that it shares.
      writer: the thread that writes to the store, in order.

    Attributes:
      is_connected: whether the index could be reached when leases were renewed last.
    """

    def __init__(self, service: Service, store: SharedStore, writer: ThreadPoolExecutor):
        self._service, self._store, self._writer = service, store, writer
        self.is_connected = True
        self._is_taking, self._is_closing = True, threading.Event()
        self._lock = threading.Lock()
        self._captured: dict[str, Callable[[int, int], Progress]] = {}
        self._unstored: dict[str, tuple[int, int]] = {}  # the first event and the first step that are not stored
        self._orphans: set[str] = set()
        self._begun: set[str] = set()
        self._thread = threading.Thread(target=self._main, name="clvr-replica", daemon=True)

    def start(self) -> None:
        """Starts the thread that renews leases, takes loops over and carries out commands."""
        self._thread.start()

    def stop_taking(self) -> None:
        """Takes no further loops over."""
        self._is_taking = False

    def close(self) -> None:
        """Ends the thread."""
        self._is_closing.set()
        if self._thread.is_alive():
            self._thread.join(60)

    # --- progress of the loops of this replica

    def accept(self, job: LoopJob) -> None:
        """Lists a new loop with all that another replica needs to run it. Raises: ClvrError."""
        progress = capture(job)(0, 0)
        files = {**given_files(job.spec), **progress.files}
        first = Progress(None, progress.images, progress.best, progress.snapshot, progress.events, files)
        self._store.accept(job.listing(), spec_to_json(job.spec), first)
        self._unstored[job.id] = job.log.next_id, len(job.state.steps)

    def save(self, job: LoopJob) -> None:
        """Saves the progress of a loop on the writer's thread; called by the device thread between two works."""
        captured = capture(job)
        with self._lock:
            is_queued = job.id in self._captured
            self._captured[job.id] = captured  # a disk that is too slow gets the latest state only
        if not is_queued:
            self._writer.submit(self._save, job)

    def _save(self, job: LoopJob) -> None:
        with self._lock:
            captured = self._captured.pop(job.id)
        try:
            events, steps = self._unstored[job.id]
            progress = captured(events, steps)
            self._store.save(job.id, progress)
            ids = [event["id"] + 1 for event in progress.events]
            numbers = [int(name[5:-4]) + 1 for name in progress.files]
            self._unstored[job.id] = max([events, *ids]), max([steps, *numbers])
        except LostLeaseError:
            self._service.scheduler.stop(job, INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - the loop continues; if this replica dies, it resumes from before
            _log.warning("%s: its progress cannot be stored (%s)", job.id, error)

    def hand_back(self, job: LoopJob) -> None:
        """Gives up a loop that was interrupted, so that another replica resumes it."""
        with contextlib.suppress(LostLeaseError):
            self.patiently(lambda: self._store.hand_back(job.id))

    def give_up(self, job: LoopJob) -> None:
        """Gives up a loop because the device thread failed; another replica resumes it."""
        with contextlib.suppress(LostLeaseError):
            self.patiently(lambda: self._store.postpone(job.id, "the device of its replica failed"))

    def forget(self, job: LoopJob) -> None:
        """Forgets a loop that has ended here."""
        self._unstored.pop(job.id, None)

    def patiently(self, write: Callable[[], None]) -> None:
        """Writes to the index, again if it cannot be reached for some seconds. Raises: ClvrError as `write`."""
        for wait in _RETRY_SECONDS:
            try:
                return write()
            except IndexUnavailableError as error:
                _log.warning("%s; trying again in %g s", error, wait)
                time.sleep(wait)
        return write()

    # --- the thread

    def _main(self) -> None:
        renewed = 0.0
        while not self._is_closing.wait(_POLL_SECONDS):
            try:
                if time.monotonic() - renewed >= self._store.lease_seconds / 3:
                    self._renew()
                    renewed = time.monotonic()
                    self._take_over()
                if self._service.jobs:
                    self._carry_out()
                self.is_connected = True
            except IndexUnavailableError as error:
                self.is_connected = False
                _log.warning("%s", error)
            except Exception:  # noqa: BLE001 - without this thread all its loops would be taken over
                _log.exception("replica %s", self._store.replica)

    def _renew(self) -> None:
        jobs = dict(self._service.jobs)
        owned = self._store.renew()
        for loop_id, owner in self._store.owners(list(set(jobs).difference(owned))).items():
            if owner != self._store.replica:
                _log.warning("%s: %s has taken it over", loop_id, owner)
                self._service.scheduler.stop(jobs[loop_id], INTERRUPTED)
        # The end of a loop could not be written, and nothing here runs it: a loop that was just accepted is in `jobs`
        # at the next time.
        orphans = owned.difference(self._service.jobs)
        for loop_id in orphans & self._orphans:
            with contextlib.suppress(LostLeaseError):
                self._store.hand_back(loop_id)
        self._orphans = orphans

    def _take_over(self) -> None:
        limit = self._service.scheduler.num_startable if self._is_taking else 0
        for run in self._store.take_over(limit) if limit else []:
            if run.resumptions > MAX_RESUMPTIONS:
                self._give_up(run)
                continue
            if run.loop_id in self._service.jobs:  # it was lost to a replica that died, and its job here ends only now
                self._store.hand_back(run.loop_id)
                continue
            try:
                self._resume(run)
            except (QueueFullError, DrainingError):
                self._store.hand_back(run.loop_id)
            except IndexUnavailableError:
                raise
            except DamagedRowError as error:
                _log.warning("%s", error)
                self._store.fail(run.loop_id, str(error))
            except Exception as error:  # noqa: BLE001 - a fault of one loop must not keep others from being resumed
                _log.warning("%s cannot be resumed: %s", run.loop_id, error, exc_info=not isinstance(error, ClvrError))
                self._store.postpone(run.loop_id, message_of(error))

    def _give_up(self, run: Run) -> None:
        entry = self._store.entry(run.loop_id)
        reason = "" if entry is None or not entry["error"] else f"; at last: {entry['error']}"
        message = f"its replica died, or could not resume it, {run.resumptions} times{reason}"
        self._store.fail(run.loop_id, message)

    def _resume(self, run: Run) -> None:
        service = self._service

        def make_job(spec: LoopSpec, events: list[Event]) -> LoopJob:
            return service.make_job(spec, EventLog(service.loop, events))

        job = restore(run, self._store, service.limits, make_job)
        self._unstored[job.id] = job.log.next_id, len(job.state.steps)
        job.log.skip(EVENT_GAP)
        job.log.append("resumed", replica=self._store.replica, images=run.images)
        service.jobs[job.id] = job
        try:
            service.scheduler.submit([job])
        except ClvrError:
            del service.jobs[job.id]
            self.forget(job)
            raise
        service.metrics.resumptions.inc()
        _log.info("%s is resumed with %d images", job.id, run.images)

    # --- commands

    def _carry_out(self) -> None:
        commands = self._store.commands()
        self._begun.intersection_update(command.id for command in commands)
        for command in commands:
            job = self._service.jobs.get(command.loop_id)
            if job is not None and command.id not in self._begun:
                self._begun.add(command.id)
                self._begin(command, job)

    def _begin(self, command: Command, job: LoopJob) -> None:
        scheduler, state, content = self._service.scheduler, job.state, command.content
        if command.kind == "accept" and job.best is None:  # rolled back since the other replica has seen its image
            self._store.answer(command.id, {"status": 400, "message": NO_IMAGE, "code": "no_image"})
        elif command.kind in ("accept", "cancel"):
            scheduler.stop(job, STOPPED if command.kind == "accept" else CANCELED)
            self._store.answer(command.id, {"status": 202})
        elif not isinstance(state, EditablePromptState):
            self._store.answer(command.id, {"status": 409, "message": "a one-shot image has no plan"})
        elif command.kind == "plan":
            changed = scheduler.change(job, lambda: state.edit_plan(content["requirements"], content["instruction"]))
            changed.add_done_callback(lambda done: self._writer.submit(self._answer, command, done))
        else:
            changed = scheduler.change(job, lambda: state.roll_back_to(content["step"]))
            changed.add_done_callback(lambda done: self._writer.submit(self._answer, command, done))

    def _answer(self, command: Command, done: Future[None]) -> None:
        try:
            self._store.answer(command.id, _outcome(done.exception()))
        except ClvrError as error:
            _log.warning("%s: the answer to %s cannot be stored (%s)", command.loop_id, command.kind, error)


def _outcome(error: BaseException | None) -> Mapping[str, Any]:
    if error is None:
        return {"status": 200}
    if isinstance(error, EditError):
        return {"status": 422, "message": str(error), "param": error.param, "code": "invalid_value"}
    if isinstance(error, EndedError):
        return {"status": 400, "message": str(error), "code": "not_running"}
    _log.error("a command failed", exc_info=error)
    return {"status": 500, "message": message_of(error), "code": "internal_error"}
