"""Answers of vision-language models that are due as one JSON object."""

import json
import re

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import UncheckedJSON


class AnswerError(ClvrError):
    """An answer that cannot be used; the message says why, in words that a model can act on."""


def read_json_object(text: str) -> UncheckedJSON:
    """The one JSON object in a model's answer.

    A code fence around it, and text before and after it, are accepted, since models add them in spite of instructions.
    Raises: AnswerError if there is none, or it is cut off.
    """
    fenced = re.search(r"```(?:json)?\s*(\{.*\})\s*```", text, re.DOTALL | re.IGNORECASE)
    start = text.find("{")
    if start < 0:
        raise AnswerError(f"no JSON object in the answer {' '.join(text.split())[:80]!r}")
    try:
        # What follows the object is ignored.
        data, _ = json.JSONDecoder().raw_decode(fenced[1] if fenced else text[start:])
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"the JSON object cannot be read ({error})") from error
    found: UncheckedJSON = data
    return found
