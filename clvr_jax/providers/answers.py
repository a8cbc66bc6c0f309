"""Answers that are due as one JSON object."""

import json
import re

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\s*```\s*", re.DOTALL | re.IGNORECASE)


def json_object(text: str) -> str | None:
    """The JSON object that an answer consists of; None if it is anything else.

    A code fence around the object is taken off, since models add one whatever they are told. Prose around the object is
    not: who answers in prose has not done what was asked, and what looks like an object in it may be an example.
    """
    fenced = _FENCED.fullmatch(text)
    inner = (fenced[1] if fenced else text).strip()
    try:
        return inner if isinstance(json.loads(inner), dict) else None
    except (ValueError, RecursionError):
        return None
