"""Outcomes of prompts on disk: one zip file each, written atomically, so that a run can be killed at any time.

    outcomes/3f/shapes-00018.failed.json: why a prompt has no outcome yet, and the usage of its attempts
    outcomes/3f/shapes-00017.zip:  outcome.json, and trajectory/ as a saved trajectory, index.html included;
                                   verification/0/ and so on, the verification examples, in the same format

Kept and discarded prompts are stored alike; the outcome of a discarded one has the stage that it reached and the
reason. The directory may be a bucket (gs://...) that all workers of a Beam runner can access.
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

from etils import epath

from clvr_jax.data.engine.actions import ImageEdit, InitialGeneration, to_json
from clvr_jax.data.engine.engine import Outcome
from clvr_jax.data.engine.roles.base import Event, History
from clvr_jax.data.trajectories.record import ProxyPrompts, TrajectoryRecord
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, JsonObject, UncheckedJSON, parse_object
from clvr_jax.interfaces import Fault
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN
from clvr_jax.reasoning.trajectories.trajectory import GAVE_UP, Step, Trajectory, Verdict

_FORMAT = 1
_MAX_BYTES = 1 << 30
_JSON, _TRAJECTORY, _VERIFICATION = "outcome.json", "trajectory", "verification"


@dataclass(frozen=True)
class FinishedPrompt:
    """The content of the outcome.json of a finished prompt.

    Attributes:
      id: id of the prompt.
      stage, reason, detail: see `engine.Outcome`.
      usage: usage by role.
      seconds: time from the first call to the last.
      num_images: number of images in the history.
      steps: number of images in the trajectory, 0 without one.
      turns: number of turns of the planner.
      content: the whole JSON object.
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
    content: UncheckedJSON

    @property
    def is_kept(self) -> bool:
        """Whether the prompt has a trajectory."""
        return self.stage == "kept"

    @property
    def verdicts(self) -> tuple[bool, ...]:
        """Whether the latest image is right, for each verification example."""
        examples = self.content["verification"]
        return tuple(len(entry["checklists"]) - 1 not in entry["mistakes"] for entry in examples)


@dataclass(frozen=True)
class FailedPrompt:
    """Why a prompt has no outcome yet.

    Attributes:
      id: id of the prompt.
      fault: fault of the provider, see `ProviderError`.
      detail: description of the fault.
      usage: usage by role, of all attempts.
    """

    id: str
    fault: str
    detail: str
    usage: Mapping[str, Mapping[str, float]]


class OutcomeStore:
    """The outcomes in a directory, by the ids of their prompts.

    Attributes:
      directory: the directory, or a bucket.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = epath.Path(directory)

    def path(self, id: str) -> epath.Path:
        """Returns the path of an outcome; outcomes are distributed over 256 subdirectories."""
        return self.directory / hashlib.sha256(id.encode()).hexdigest()[:2] / f"{id}.zip"

    def __contains__(self, id: str) -> bool:
        found: bool = self.path(id).exists()
        return found

    def write(
        self,
        outcome: Outcome,
        usage: Mapping[str, Mapping[str, float]],
        seconds: float,
        adapted: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Stores an outcome; the usage of failed attempts at the prompt is added to its usage.

        Args:
          outcome: outcome of a prompt.
          usage: usage by role.
          seconds: time of the prompt.
          adapted: for each server the fields of requests that it refused.
        Raises: ClvrError, one line, if the file cannot be written; then nothing is left on disk.
        """
        id = outcome.item.id
        if (failed := self.failed(id)) is not None:
            usage = _sum_usage(failed.usage, usage)
        self._write_atomically(self.path(id), _pack(outcome, usage, seconds, adapted or {}))
        if failed is not None:
            self._failed_path(id).unlink(missing_ok=True)

    def write_failed(self, id: str, fault: Fault, detail: str, usage: Mapping[str, Mapping[str, float]]) -> None:
        """Stores why a prompt has no outcome, and the usage of the attempt. Raises: ClvrError, see `write`."""
        if (before := self.failed(id)) is not None:
            usage = _sum_usage(before.usage, usage)
        content = {"id": id, "fault": fault, "detail": detail, "usage": usage}
        self._write_atomically(self._failed_path(id), json.dumps(content, indent=1).encode())

    def failed(self, id: str) -> FailedPrompt | None:
        """Returns why a prompt has no outcome yet; None if it was not attempted, or the file is damaged."""
        path = self._failed_path(id)
        try:
            content = parse_object(path.read_bytes(), str(path))
            return FailedPrompt(id, content.text("fault"), content.text("detail"), _usage(content))
        except (OSError, ClvrError):
            return None

    def remove(self, id: str) -> None:
        """Removes an outcome, so that the prompt is processed again."""
        self.path(id).unlink(missing_ok=True)

    def _failed_path(self, id: str) -> epath.Path:
        path = self.path(id)
        return path.parent / f"{id}.failed.json"

    def _write_atomically(self, path: epath.Path, content: bytes) -> None:
        # On a local disk a rename is atomic; in a bucket files are written atomically anyway.
        temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ClvrError(
                f"{path}: cannot be written ({error.strerror or error}); finished prompts are stored, run it again"
            ) from error

    def ids(self) -> set[str]:
        """Returns the ids of all finished prompts."""
        if not self.directory.exists():
            return set()
        return {path.stem for shard in self.directory.iterdir() for path in shard.iterdir() if path.suffix == ".zip"}

    def read(self, id: str) -> FinishedPrompt:
        """Reads the outcome of a prompt. Raises: ClvrError if it does not exist or cannot be read."""
        with self._open(id) as archive:
            content = parse_object(archive.read(_JSON), f"{self.path(id)}: {_JSON}")
        _check_examples(content)
        return FinishedPrompt(
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
        """Loads the trajectory of a prompt, kept or discarded, for display.

        Returns: the trajectory; None if it has no image. Discarded trajectories also have images that were rolled back.
        Raises: ClvrError, see `read`.
        """
        return self._load(id, _TRAJECTORY)

    def _load(self, id: str, prefix: str) -> Trajectory | None:
        with self._open(id) as archive, tempfile.TemporaryDirectory() as directory:
            names = [name for name in archive.namelist() if name.startswith(f"{prefix}/")]
            if not names:
                return None
            archive.extractall(directory, names)
            return Trajectory.load(Path(directory) / prefix)

    def record(self, finished: FinishedPrompt) -> TrajectoryRecord:
        """Returns the record of a kept prompt. Raises: ClvrError if the prompt was not kept; see also `read`."""
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

    def verification(self, finished: FinishedPrompt) -> Iterator[TrajectoryRecord]:
        """Yields the verification examples of a prompt, kept or discarded. Raises: ClvrError, see `read`."""
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
    def _open(self, id: str) -> Iterator[zipfile.ZipFile]:
        path = self.path(id)
        try:
            if path.stat().length > _MAX_BYTES:
                raise zipfile.BadZipFile(f"more than {_MAX_BYTES >> 20} MiB")
            with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
                if sum(member.file_size for member in archive.infolist()) > _MAX_BYTES:
                    raise zipfile.BadZipFile(f"more than {_MAX_BYTES >> 20} MiB when unpacked")
                yield archive
        except FileNotFoundError:
            raise ClvrError(f"{path}: no such outcome") from None
        # RuntimeError: the archive is encrypted, or its compression is not supported. KeyError: a member is missing.
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError) as error:
            raise ClvrError(
                f"{path}: cannot be read ({error}); remove it, and the prompt is processed again"
            ) from error


def _usage(content: JsonObject) -> dict[str, dict[str, float]]:
    """Returns the usage by role."""
    stored = content.nested("usage")
    roles = {role: stored.nested(role) for role in stored.content}
    return {role: {name: usage.number(name) for name in usage.content} for role, usage in roles.items()}


def _check_examples(content: JsonObject) -> None:
    """Raises ClvrError unless the fields that records need are present and have valid types."""
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


def _sum_usage(*usages: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the sums of usages by role."""
    total: dict[str, dict[str, float]] = {}
    for by_role in usages:
        for role, usage in by_role.items():
            own = total.setdefault(role, {})
            for name, value in usage.items():
                own[name] = own.get(name, 0) + value
    return dict(sorted(total.items()))


def _pack(
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
    """Returns the images of a discarded trajectory with the turns and failed checks; None if there is no image."""
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


def _event_to_json(event: Event) -> dict[str, JSON]:
    validation = event.validation
    return {
        "state": event.state,
        "turn": to_json(event.turn) if event.turn else None,
        "picture": event.image_index,
        "checks": [[check.question, check.passed, check.evidence] for check in event.checks],
        "validation": None
        if validation is None
        else {
            "accepted": validation.accepted,
            "gaps": validation.gaps,
            "feedback": validation.feedback,
            "roll_back_to": validation.roll_back_to,
        },
        "error": event.error,
    }
