"""Fields that not every server takes: left out, or sent under another name, once the server refuses them by name."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clvr_jax.console import console

_REFUSAL = re.compile(
    r"unsupported|not support|unknown|unrecognized|unrecognised|unexpected|not permitted|not allowed|not accept|extra"
    r"|invalid (?:parameter|argument|field)|only the default|cannot find|deprecated|no longer|not available|instead"
)
_OTHER_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


@dataclass(frozen=True)
class OptionalFields:
    """Fields of a request that a server may refuse.

    Attributes:
      fields: names of the fields that are left out together.
      words: words of an error that names them, in lower case; those of `fields` if there are none.
      is_any_mention: whether an error that only mentions them is a refusal; else it must say so.
      consequence: of leaving them out, for people.
    """

    fields: tuple[str, ...]
    words: tuple[str, ...] = ()
    is_any_mention: bool = False
    consequence: str = ""

    def is_refused(self, message: str) -> bool:
        """Whether an error message refuses the fields."""
        if self.is_any_mention:
            return any(word in message for word in self.words)
        named = any(re.search(rf"\b{re.escape(word)}\b", message) for word in self.words or self.fields)
        return named and _REFUSAL.search(message) is not None


class Adaptation:
    """What one server takes, learned from what it refuses; may be used from many threads.

    Args:
      server: its name, for the note to the user.
      known: fields that it may refuse.
      without: names of fields that are never sent.
    """

    def __init__(self, server: str, known: Sequence[OptionalFields], without: Sequence[str] = ()):
        self._server, self._known, self._without = server, known, set(without)
        self._renamed: dict[str, str] = {}
        self._notes: list[str] = []
        self._lock = threading.Lock()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is different from what was asked for, in words; for results."""
        return tuple(self._notes)

    def adapted(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the request as the server takes it."""
        with self._lock:
            return {
                self._renamed.get(name, name): value for name, value in request.items() if name not in self._without
            }

    def learn(self, message: str, sent: Mapping[str, Any]) -> bool:
        """Learns from the message of a rejected request.

        Returns: whether another request than `sent` can be made now.
        """
        message = message.lower()
        with self._lock:
            # Both are done: a server may refuse two fields in one message, or name them one after the other.
            return any([self._rename(message, sent), *[self._omit(each, message, sent) for each in self._known]])

    def _rename(self, message: str, sent: Mapping[str, Any]) -> bool:
        for name, other in _OTHER_NAMES.items():
            # "max_tokens is too large" is another complaint: it is about the number.
            if name not in sent or not OptionalFields((name,)).is_refused(message):
                continue
            original = next((key for key, value in self._renamed.items() if value == name), name)
            if original in self._renamed and original == other:  # neither name is taken
                return False
            if self._renamed.get(original) != other:
                self._renamed[original] = other
                self._note(f"{name} is sent as {other}")
            return True
        return False

    def _omit(self, known: OptionalFields, message: str, sent: Mapping[str, Any]) -> bool:
        if not set(known.fields) & set(sent) or not known.is_refused(message):
            return False
        if not set(known.fields) <= self._without:
            self._without |= set(known.fields)
            consequence = f"; {known.consequence}" if known.consequence else ""
            self._note(f"{' and '.join(known.fields)} left out{consequence}")
        return True

    def _note(self, what: str) -> None:
        self._notes.append(what)
        console.print(f"{self._server}: the server refuses a field; {what}", style="yellow", markup=False)
