"""Finished prompts on disk: one zip file for each, written whole or not at all, so that a run can be killed anywhere.

    outcomes/3f/shapes-00018.failed.json: why a prompt has no outcome yet, and what its tries cost
    outcomes/3f/shapes-00017.zip:  outcome.json, and trajectory/ as a saved trajectory, index.html included;
                                   verification/0/ and so on, the verification examples, in the same form

What was kept and what was discarded lie side by side; a discarded one tells how far it came and why it went no further.
The folder may be a bucket (gs://...), where the workers of a Beam runner can all reach it.
"""

import hashlib
import io
import json
import os
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from clvr_jax.data.engine.actions import ImageEdit, InitialGeneration, to_json
from clvr_jax.data.engine.engine import Outcome
from clvr_jax.data.engine.roles import Event, History
from clvr_jax.data.trajectory_record import ProxyPrompts, TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import Fault
from clvr_jax.json_input import JsonObject, parse_object
from clvr_jax.reasoning.actions import IMAGE_GEN
from clvr_jax.reasoning.trajectory import GAVE_UP, Step, Trajectory, Verdict

_FORMAT = 1
_MAX_BYTES = 1 << 30
_JSON, _TRAJECTORY, _VERIFICATION = "outcome.json", "trajectory", "verification"


@dataclass(frozen=True)
class Finished:
    """What outcome.json says of a finished prompt.

    stage, reason, detail: see `engine.Outcome`. usage: by role. seconds: from its first call to its last.
    pictures, steps: drawn in all, and kept. content: all of it.
    """

    id: str
    stage: str | None
    reason: str
    detail: str
    usage: Mapping[str, Mapping[str, float]]
    seconds: float
    num_images: int
    steps: int
    turns: int
    content: Mapping[str, Any]

    @property
    def is_kept(self) -> bool:
        """Whether it made a trajectory."""
        return self.stage == "kept"

    @property
    def verdicts(self) -> tuple[bool, ...]:
        """For each verification example whether its latest image is right."""
        examples = self.content["verification"]
        return tuple(len(entry["checklists"]) - 1 not in entry["mistakes"] for entry in examples)


@dataclass(frozen=True)
class Failed:
    """Why a prompt has no outcome yet.

    fault: of the provider, see `ProviderError`. detail: in words. usage: by role, of all tries.
    """

    id: str
    fault: str
    detail: str
    usage: Mapping[str, Mapping[str, float]]


class OutcomeStore:
    """The outcomes in a folder, by the ids of their prompts."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = epath.Path(folder)

    def path(self, id: str) -> epath.Path:
        """Where an outcome lies; spread over 256 folders, since there may be many."""
        return self.folder / hashlib.sha256(id.encode()).hexdigest()[:2] / f"{id}.zip"

    def __contains__(self, id: str) -> bool:
        return self.path(id).exists()

    def write(
        self,
        outcome: Outcome,
        usage: Mapping[str, Mapping[str, float]],
        seconds: float,
        adapted: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Keeps an outcome; what failed tries of the prompt cost is part of its usage.

        Args:
          outcome: of a prompt.
          usage: by role.
          seconds: that it took.
          adapted: for each server the fields of requests that it refused.
        Raises: ClvrError, one line, if it cannot be written; then nothing is left behind.
        """
        id = outcome.item.id
        if (failed := self.failed(id)) is not None:
            usage = _added(failed.usage, usage)
        self._put(self.path(id), _packed(outcome, usage, seconds, adapted or {}))
        if failed is not None:
            self._failed_path(id).unlink(missing_ok=True)

    def write_failed(self, id: str, fault: Fault, detail: str, usage: Mapping[str, Mapping[str, float]]) -> None:
        """Keeps why a prompt has no outcome, and what that cost. Raises: as `write` does."""
        if (before := self.failed(id)) is not None:
            usage = _added(before.usage, usage)
        content = {"id": id, "fault": fault, "detail": detail, "usage": usage}
        self._put(self._failed_path(id), json.dumps(content, indent=1).encode())

    def failed(self, id: str) -> Failed | None:
        """Why a prompt has no outcome yet; None if nobody tried, or the note is damaged."""
        path = self._failed_path(id)
        try:
            content = parse_object(path.read_bytes(), str(path))
            return Failed(id, content.text("fault"), content.text("detail"), _usage(content))
        except (OSError, ClvrError):
            return None

    def remove(self, id: str) -> None:
        """Forgets an outcome, so that the prompt is worked on again."""
        self.path(id).unlink(missing_ok=True)

    def _failed_path(self, id: str) -> epath.Path:
        path = self.path(id)
        return path.parent / f"{id}.failed.json"

    def _put(self, path: epath.Path, content: bytes) -> None:
        # On one machine a rename is what makes a file appear whole; in a bucket files always do.
        temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ClvrError(
                f"{path}: cannot be written ({error.strerror or error}); finished prompts are kept, run it again"
            ) from error

    def ids(self) -> set[str]:
        """All that are finished."""
        if not self.folder.exists():
            return set()
        return {path.stem for shard in self.folder.iterdir() for path in shard.iterdir() if path.suffix == ".zip"}

    def read(self, id: str) -> Finished:
        """What is said of one. Raises: ClvrError if it is not there or cannot be read."""
        with self._opened(id) as archive:
            content = parse_object(archive.read(_JSON), f"{self.path(id)}: {_JSON}")
        _check_examples(content)
        return Finished(
            id=id,
            stage=content.optional("stage", content.text),
            reason=content.text("reason"),
            detail=content.text("detail"),
            usage=_usage(content),
            seconds=content.number("seconds", low=0),
            num_images=content.integer("pictures", low=0),
            steps=content.integer("steps", low=0),
            turns=content.integer("turns", low=0),
            content=content.content,
        )

    def trajectory(self, id: str) -> Trajectory | None:
        """How it went, for a page: what was kept as it is told, what was discarded as it happened, None if nothing was
        drawn. Raises: as `read` does."""
        return self._load(id, _TRAJECTORY)

    def _load(self, id: str, place: str) -> Trajectory | None:
        with self._opened(id) as archive, tempfile.TemporaryDirectory() as folder:
            names = [name for name in archive.namelist() if name.startswith(f"{place}/")]
            if not names:
                return None
            archive.extractall(folder, names)
            return Trajectory.load(Path(folder) / place)

    def record(self, finished: Finished) -> TrajectoryRecord:
        """The record of one that was kept. Raises: as `read` does."""
        trajectory = self.trajectory(finished.id)
        if trajectory is None or not finished.is_kept:
            raise ClvrError(f"{self.path(finished.id)}: was not kept")
        content = finished.content
        proxies = tuple(
            entry and ProxyPrompts(entry["p_t2i"], entry["p_i2i"], tuple(entry["i_ref"]))
            for entry in content["proxies"]
        )
        return TrajectoryRecord(
            finished.id,
            trajectory,
            content["metadata"],
            tuple(content["checklists"]),
            proxies,
            tuple(content["mistakes"]),
        )

    def verification(self, finished: Finished) -> Iterator[TrajectoryRecord]:
        """Yields the verification examples of one, kept or not. Raises: as `read` does."""
        for number, entry in enumerate(finished.content["verification"]):
            trajectory = self._load(finished.id, f"{_VERIFICATION}/{number}")
            if trajectory is None:
                raise ClvrError(f"{self.path(finished.id)}: verification example {number} is missing")
            yield TrajectoryRecord(
                entry["id"],
                trajectory,
                finished.content["metadata"],
                tuple(entry["checklists"]),
                mistakes=tuple(entry["mistakes"]),
                is_verification=True,
            )

    @contextmanager
    def _opened(self, id: str) -> Iterator[zipfile.ZipFile]:
        path = self.path(id)
        try:
            with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
                if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
                    raise zipfile.BadZipFile(f"more than {_MAX_BYTES >> 20} MiB when unpacked")
                yield archive
        except FileNotFoundError:
            raise ClvrError(f"{path}: no such outcome") from None
        # RuntimeError: encrypted, or packed in a way that Python does not know. KeyError: no such member.
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError) as error:
            raise ClvrError(f"{path}: cannot be read ({error}); remove it, and the prompt is done again") from error


def _usage(content: JsonObject) -> dict[str, dict[str, float]]:
    """Usage by role."""
    bill = content.nested("usage")
    roles = {role: bill.nested(role) for role in bill.content}
    return {role: {name: usage.number(name) for name in usage.content} for role, usage in roles.items()}


def _check_examples(content: JsonObject) -> None:
    """Raises ClvrError unless the fields are there from which records are made."""
    content.nested("metadata")
    content.integers("mistakes")
    for example in content.objects("verification"):
        example.text("id")
        example.integers("mistakes")
    for owner in (content, *content.objects("verification")):
        if not isinstance(owner.content.get("checklists"), list):
            raise ClvrError(f"{owner.where}: checklists must be a list")
    proxies = content.content.get("proxies")
    if not isinstance(proxies, list) or not all(each is None or isinstance(each, dict) for each in proxies):
        raise ClvrError(f"{content.where}: proxies must be a list of objects")
    for number, each in enumerate(proxies):
        if each is not None:
            proxy = JsonObject(each, f"{content.where}: proxies[{number}]")
            proxy.text("p_t2i")
            proxy.text("p_i2i")
            proxy.integers("i_ref")


def _added(*bills: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Bills by role, added up."""
    total: dict[str, dict[str, float]] = {}
    for bill in bills:
        for role, usage in bill.items():
            own = total.setdefault(role, {})
            for name, value in usage.items():
                own[name] = own.get(name, 0) + value
    return dict(sorted(total.items()))


def _packed(
    outcome: Outcome, usage: Mapping[str, Mapping[str, float]], seconds: float, adapted: Mapping[str, Sequence[str]]
) -> bytes:
    history = outcome.history or History(outcome.item)
    record = outcome.record
    trajectory = record.trajectory if record else discarded_trajectory(outcome)
    content = {
        "format": _FORMAT,
        "id": outcome.item.id,
        "prompt": outcome.item.prompt,
        "metadata": dict(outcome.item.metadata),
        "stage": outcome.stage,
        "reason": outcome.reason,
        "detail": outcome.detail,
        "usage": usage,
        "seconds": round(seconds, 4),
        "adapted": {server: list(notes) for server, notes in sorted(adapted.items())},
        "pictures": len(history.images),
        "steps": len(record.trajectory.generated) if record else 0,
        "turns": len(history.events),
        "events": [_event_to_json(event) for event in history.events],
        "checklists": record.checklists if record else (),
        "proxies": [
            proxy and {"p_t2i": proxy.p_t2i, "p_i2i": proxy.p_i2i, "i_ref": proxy.i_ref}
            for proxy in (record.proxies if record else ())
        ],
        "mistakes": record.mistakes if record else (),
        "verification": [
            {"id": example.id, "checklists": example.checklists, "mistakes": example.mistakes}
            for example in outcome.verification
        ],
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_JSON, json.dumps(content, indent=1))
        for name, data in trajectory.files().items() if trajectory else ():
            archive.writestr(f"{_TRAJECTORY}/{name}", data)
        for number, example in enumerate(outcome.verification):
            for name, data in example.trajectory.files().items():
                archive.writestr(f"{_VERIFICATION}/{number}/{name}", data)
    return buffer.getvalue()


def discarded_trajectory(outcome: Outcome) -> Trajectory | None:
    """The pictures of a trajectory that was discarded, with what was thought and found; None if there are none."""
    history = outcome.history
    if history is None or not history.images:
        return None
    steps = []
    for event in history.events:
        if event.turn is None or event.image_index is None:
            continue
        action = event.turn.action
        assert isinstance(action, InitialGeneration | ImageEdit)
        failed = tuple(f"{check.question} {check.evidence}" for check in event.checks if not check.passed)
        steps.append(
            Step(
                f"{event.turn.perceive}\n{event.turn.reason}\n{action.prompt}",
                IMAGE_GEN,
                action.ref_img_list if isinstance(action, ImageEdit) else (),
                history.images[event.image_index],
                Verdict(failed) if event.checks else None,
                rolled_back=event.image_index not in history.path,
            )
        )
    return Trajectory(outcome.item.prompt, tuple(steps), GAVE_UP, error=f"{outcome.reason}: {outcome.detail}")


def _event_to_json(event: Event) -> dict[str, Any]:
    validation = event.validation
    return {
        "state": event.state,
        "turn": to_json(event.turn) if event.turn else None,
        "picture": event.image_index,
        "checks": [[check.question, check.passed, check.evidence] for check in event.checks],
        "validation": validation
        and {
            "accepted": validation.accepted,
            "gaps": validation.gaps,
            "feedback": validation.feedback,
            "roll_back_to": validation.roll_back_to,
        },
        "error": event.error,
    }
