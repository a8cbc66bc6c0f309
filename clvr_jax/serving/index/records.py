"""What the index has about loops, and what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RUNNING, FINISHED, FAILED, CANCELED, INTERRUPTED = "running", "finished", "failed", "canceled", "interrupted"
STATES = (RUNNING, FINISHED, FAILED, CANCELED, INTERRUPTED)
"""Of a loop in the index."""


@dataclass(frozen=True)
class NewLoop:
    """A loop that was just accepted.

    Attributes:
      id: "loop_" and 24 hexadecimal digits.
      created: seconds since 1970.
      mode, prompt, seed, request: see `LoopSpec`.
      model: name of the image model.
    """

    id: str
    created: float
    mode: str
    prompt: str
    model: str
    seed: int
    request: Mapping[str, Any]


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
      damage: what is wrong with its row, in one line; all but `loop_id` and `owner` mean nothing then.
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
    damage: str | None = None


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
