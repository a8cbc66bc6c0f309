"""A loop whose state can be saved between two works and restored in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, JsonObject
from clvr_jax.reasoning.conversation.actions import PendingReply, Reply
from clvr_jax.reasoning.loop.budget import Account
from clvr_jax.reasoning.loop.editable import EditablePromptState
from clvr_jax.reasoning.trajectories.trajectory import CANCELED, Trajectory

SNAPSHOT_FORMAT = 1


class ResumablePromptState(EditablePromptState):
    """The state of a prompt, which can be saved and restored.

    A restored loop continues exactly as the one that was saved would have: its seeds depend on its history only.
    """

    def snapshot(self) -> dict[str, JSON]:
        """Returns the state without its images, as JSON values; call it between two works."""
        return {
            "format": SNAPSHOT_FORMAT,
            # A trajectory needs an outcome; this one is never shown.
            "trajectory": self._trajectory(CANCELED).to_dict(),
            "required": None if self._required is None else list(self._required),
            "is_selection_due": self._is_selection_due,
            "plans": [[score, number, _pending_to_json(plan)] for score, number, plan in self._plans],
            "is_plan_settled": self._is_plan_settled,
            "account": [self._account.steps, self._account.nfe, self._account.highest_nfe],
            "history": list(self._history),
            "candidates": [
                [number, None if reply is None else _pending_to_json(reply)]
                for number, reply in self._candidates.items()
            ],
            "first_candidate": self._first_candidate,
            "attempts": _pairs(self._attempts),
            "earlier_attempts": _pairs(self._earlier_attempts),
            "rollbacks": _pairs(self._rollbacks),
            "pending": None if self._pending is None else _pending_to_json(self._pending),
            "num_wanted": self._num_wanted,
            "seconds": self._seconds,
            "booked_seconds": self._booked_seconds,
            "instruction": self._instruction,
        }

    def restore(self, content: JsonObject, trajectory: Trajectory) -> None:
        """Takes over a saved state.

        Args:
          content: what `snapshot` returned.
          trajectory: its field `trajectory` with the images.
        Raises: ClvrError if it is of another format or damaged; the state must not be used then.
        """
        if content.integer("format") != SNAPSHOT_FORMAT:
            raise ClvrError(f"{content.where}: is of another version; the loop cannot be resumed")
        try:
            self._required = content.optional("required", content.texts)
            self._is_selection_due = content.boolean("is_selection_due")
            self._plans = [
                (float(score), int(number), _pending_from_json(plan, content.where))
                for score, number, plan in content.content["plans"]
            ]
            self._is_plan_settled = content.boolean("is_plan_settled")
            self._account = Account(self._budget, *content.integers("account"))
            self._history = list(content.integers("history"))
            self._candidates = {
                int(number): None if reply is None else _pending_from_json(reply, content.where)
                for number, reply in content.content["candidates"]
            }
            self._first_candidate = content.integer("first_candidate", low=0)
            self._attempts = _mapping(content, "attempts")
            self._earlier_attempts = _mapping(content, "earlier_attempts")
            self._rollbacks = _mapping(content, "rollbacks")
            pending = content.optional("pending", content.nested)
            self._pending = None if pending is None else _pending_from_json(pending.content, content.where)
            self._num_wanted = content.integer("num_wanted", low=0)
            self._seconds = content.number("seconds", low=0)
            self._booked_seconds = content.number("booked_seconds", low=0)
            self._instruction = content.optional("instruction", content.text)
        except (KeyError, TypeError, ValueError) as error:
            raise ClvrError(f"{content.where}: is damaged ({type(error).__name__}: {error})") from error
        self._steps, self._edits = list(trajectory.steps), list(trajectory.edits)
        self._parent, self._error = trajectory.parent, trajectory.error
        numbers = [*self._history, *(number for number in self._candidates if number >= 0)]
        if not all(0 <= number < len(self._steps) for number in numbers):
            raise ClvrError(f"{content.where}: is damaged: it names steps that there are not")


def _pending_to_json(pending: PendingReply) -> dict[str, JSON]:
    reply = pending.reply
    unmet = None if reply.unmet is None else list(reply.unmet)
    return {**asdict(pending), "reply": {"reasoning": reply.reasoning, "action": reply.action, "unmet": unmet}}


def _pending_from_json(content: object, where: str) -> PendingReply:
    if not isinstance(content, Mapping):
        raise ClvrError(f"{where}: a reply must be a JSON object")
    entry = JsonObject(content, where)
    reply = entry.nested("reply")
    unmet = reply.optional("unmet", reply.texts)
    return PendingReply(
        Reply(reply.text("reasoning"), reply.text("action"), unmet),
        entry.integer("attempts", low=0),
        entry.integer("redraw", low=0),
    )


def _pairs(numbers: Mapping[int, int]) -> list[JSON]:
    """Returns a mapping as pairs, because names in JSON are texts."""
    return [[key, value] for key, value in numbers.items()]


def _mapping(content: JsonObject, name: str) -> dict[int, int]:
    return {int(key): int(value) for key, value in content.content[name]}
