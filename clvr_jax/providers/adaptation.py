"""Request fields that a server does not support: omitted, or sent under another name, once it rejects them by name."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clvr_jax.display.console import console
from clvr_jax.files.json_input import JSON

_REJECTION = re.compile(
    r"unsupported|not support|unknown|unrecognized|unrecognised|unexpected|not permitted|not allowed|not accept|extra"
    r"|invalid (?:parameter|argument|field)|only the default|cannot find|deprecated|no longer|not available|instead"
)
_OTHER_NAMES = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


@dataclass(frozen=True)
class OptionalFields:
    """Fields of a request that a server may reject.

    Attributes:
      fields: names of the fields, which are omitted together.
      words: lower-case words that an error about them contains; the names in `fields` if empty.
      is_any_mention: whether any error that contains one of the words rejects the fields; otherwise the error must also
        say that something is not supported.
      consequence: effect of the omission, for messages.
    """

    fields: tuple[str, ...]
    words: tuple[str, ...] = ()
    is_any_mention: bool = False
    consequence: str = ""

    def is_rejected(self, message: str) -> bool:
        """Returns whether an error message rejects the fields."""
        if self.is_any_mention:
            return any(word in message for word in self.words)
        is_named = any(re.search(rf"\b{re.escape(word)}\b", message) for word in self.words or self.fields)
        return is_named and _REJECTION.search(message) is not None


class Adaptation:
    """Adapts requests to one server by its error messages; may be used from many threads.

    Args:
      server: its name, for the note to the user.
      optional: fields that it may reject.
      omit: names of fields that are never sent.
    """

    def __init__(self, server: str, optional: Sequence[OptionalFields], omit: Sequence[str] = ()):
        self._server, self._optional, self._omitted = server, optional, set(omit)
        self._renamed: dict[str, str] = {}
        self._notes: list[str] = []
        self._lock = threading.Lock()

    @property
    def notes(self) -> tuple[str, ...]:
        """Descriptions of all changes to the requests, for results."""
        return tuple(self._notes)

    def adapted(self, request: Mapping[str, JSON]) -> dict[str, JSON]:
        """Returns the request without omitted fields and with renamed ones."""
        with self._lock:
            return {
                self._renamed.get(name, name): value for name, value in request.items() if name not in self._omitted
            }

    def learn(self, message: str, sent: Mapping[str, JSON]) -> bool:
        """Updates the adaptation by the error message of a rejected request.

        Returns: whether the adapted request now differs from `sent`.
        """
        message = message.lower()
        with self._lock:
            # Always both: a server may reject several fields in one message.
            return any([self._rename(message, sent), *[self._omit(each, message, sent) for each in self._optional]])

    def _rename(self, message: str, sent: Mapping[str, JSON]) -> bool:
        for name, other in _OTHER_NAMES.items():
            # "max_tokens is too large" rejects the value, not the field.
            if name not in sent or not OptionalFields((name,)).is_rejected(message):
                continue
            original = next((key for key, value in self._renamed.items() if value == name), name)
            if original in self._renamed and original == other:  # both names are rejected
                return False
            if self._renamed.get(original) != other:
                self._renamed[original] = other
                self._note(f"{name} is sent as {other}")
            return True
        return False

    def _omit(self, optional: OptionalFields, message: str, sent: Mapping[str, JSON]) -> bool:
        if not set(optional.fields) & set(sent) or not optional.is_rejected(message):
            return False
        if not set(optional.fields) <= self._omitted:
            self._omitted |= set(optional.fields)
            consequence = f"; {optional.consequence}" if optional.consequence else ""
            self._note(f"{' and '.join(optional.fields)} left out{consequence}")
        return True

    def _note(self, text: str) -> None:
        self._notes.append(text)
        console.print(f"{self._server}: the server rejects a field; {text}", style="yellow", markup=False)
