"""Strict parsers of judges' replies: a score that is missing, repeated or out of range is an error.

The parsers accept text around a score, bold labels, a score as a fraction ("8/10"), and a code fence around JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from clvr_jax.interfaces.answers import AnswerError, read_json_object

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_DECORATION = r"[ \t*_`#>]*"
_BULLET = rf"(?:\d+[.)]{_DECORATION}|[-•]{_DECORATION})?"
_COLON = "[:\uff1a=]?"  # models that write Chinese use the full-width one


def labeled_scores(text: str, labels: Sequence[str], low: float, high: float, whole: bool = False) -> dict[str, float]:
    """Parses a reply with one line "Label: score" for each label.

    Args:
      text: the reply.
      labels: each must begin exactly one line, bold or not.
      low, high: inclusive bounds of every score.
      whole: whether scores must be integers.
    Returns: label -> score.
    Raises: AnswerError with a message that the judge can act on.
    """
    return {label: _labeled(text, label, low, high, whole) for label in labels}


def json_score(text: str, name: str, low: float, high: float, whole: bool = False) -> float:
    """Parses the number `name` of the JSON object in a reply. Raises: AnswerError, also if it is out of bounds."""
    value = read_json_object(text).get(name)
    value = int(value) if isinstance(value, bool) else value
    if not isinstance(value, int | float):
        raise AnswerError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return _bounded(name, float(value), low, high, whole)


def yes_or_no(text: str) -> bool:
    """Returns whether a reply is yes. Raises: AnswerError if it has neither yes nor no, or both."""
    said = set(re.findall(r"\b(yes|no)\b", text.lower()))
    if len(said) != 1:
        raise AnswerError(f"the answer must be yes or no, got {' '.join(text.split())[:80]!r}")
    return said == {"yes"}


def probability(text: str) -> float:
    """Parses a number from 0 to 1. Raises: AnswerError."""
    try:
        value = float(text)
    except ValueError as error:
        raise AnswerError(f"the answer must be a number, got {text[:80]!r}") from error
    return _bounded("the probability", value, 0, 1, False)


def _labeled(text: str, label: str, low: float, high: float, whole: bool) -> float:
    start = rf"(?im)^{_DECORATION}{_BULLET}{re.escape(label)}{_DECORATION}(?:\([^)\n]*\))?"
    found = re.findall(rf"{start}{_DECORATION}{_COLON}{_DECORATION}{_NUMBER}([^\n]*)", text)
    if not found:
        raise AnswerError(f"no line {label}: <score>")
    if len(found) > 1:
        raise AnswerError(f"{len(found)} scores for {label}; give one")
    number, rest = found[0]
    # "7-8" and "7 or 8" are two scores, "8/10" is one.
    if re.match(rf"\s*(?:-|\u2013|to|or|and)\s*{_NUMBER}", rest):
        raise AnswerError(f"two scores for {label} ({number}{rest.strip()[:20]}); give one")
    if (share := re.match(r"\s*/\s*(\d+)", rest)) and float(share[1]) != high:
        raise AnswerError(f"{label} is given out of {share[1]}; give a score from {low:g} to {high:g}")
    return _bounded(label, float(number), low, high, whole)


def _bounded(name: str, value: float, low: float, high: float, whole: bool) -> float:
    if not low <= value <= high or (whole and value != int(value)):
        raise AnswerError(f"{name} must be a {'whole ' if whole else ''}number from {low:g} to {high:g}, got {value:g}")
    return value
