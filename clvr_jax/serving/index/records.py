"""What the index has about the running loops of replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """A running loop as the index knows it.

    Attributes:
      loop_id, created: of the loop.
      owner: the replica that runs it; None while no replica does.
      started: when its first work began; None while it waits.
      images, best: number of images so far, and the step of the best one.
      spec: what to run, see `specs.py`.
      snapshot: its latest state, see `ResumablePromptState.snapshot`; None for a one-shot image.
      request: the request that is stored with the loop.
      resumptions: how often it was taken over from a replica that died.
    """

    loop_id: str
    created: float
    owner: str | None
    started: float | None
    images: int
    best: int | None
    spec: dict[str, Any]
    snapshot: dict[str, Any] | None
    request: dict[str, Any]
    resumptions: int


@dataclass(frozen=True)
class Command:
    """What a user asked for at a replica that does not run the loop. kind: "accept", "cancel", "plan", "rollback"."""

    id: str
    loop_id: str
    kind: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """What the owner of a loop saves between two works.

    started, images, best, snapshot: see `Run`. events: that are new. files: new images by name.
    """

    started: float | None
    images: int
    best: int | None
    snapshot: Mapping[str, Any] | None
    events: Sequence[Mapping[str, Any]]
    files: Mapping[str, bytes]
