"""Replies of models that think: where the thought ends and the reply begins."""

import re

_TAG = r"(?:think|thinking|thought)"
_CLOSING = re.compile(rf"</{_TAG}\s*>", re.IGNORECASE)
_OPENING = re.compile(rf"^\s*<{_TAG}\s*>", re.IGNORECASE | re.MULTILINE)


def strip_thoughts(text: str) -> str | None:
    """Returns what a model replies after it has thought; None if the text ends within a thought.

    A server that does not parse thoughts leaves them in the reply, with both tags or, where the chat template opens the
    thought, with the closing tag only. Drafts in a thought look like replies, so nobody may read them.
    """
    closings = list(_CLOSING.finditer(text))
    reply = text[closings[-1].end() :].lstrip() if closings else text
    return None if _OPENING.search(reply) else reply
