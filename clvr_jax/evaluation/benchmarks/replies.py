"""What judges answer, read strictly: a score that is missing, said twice or out of range is no score.

What they are put up with: words around it, bold labels, a score as a share ("8/10"), a code fence around JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from clvr_jax.reasoning.answers import AnswerError, read_json_object

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_DECORATION = r"[ \t*_`#>]*"
_BULLET = rf"(?:\d+[.)]{_DECORATION}|[-•]{_DECORATION})?"
_COLON = "[:\uff1a=]?"  # models that write Chinese use the full-width one


def labelled_scores(text: str, labels: Sequence[str], low: float, high: float, whole: bool = False) -> dict[str, float]:
    """The scores of a reply with one line "Label: score" for each label.

    Args:
      text: the reply.
      labels: each must stand at the beginning of exactly one line, bold or not.
      low, high: bounds of every score, included.
      whole: whether only whole numbers are scores.
    Raises: AnswerError that says what is wrong, in words that a model can act on.
    """
    return {label: _labelled(text, label, low, high, whole) for label in labels}


def json_score(text: str, name: str, low: float, high: float, whole: bool = False) -> float:
    """The number under `name` of the JSON object in a reply. Raises: AnswerError, also for what is out of bounds."""
    value = read_json_object(text).get(name)
    value = int(value) if isinstance(value, bool) else value
    if not isinstance(value, int | float):
        raise AnswerError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    return _bounded(name, float(value), low, high, whole)


def yes_or_no(text: str) -> bool:
    """Whether a reply says yes. Raises: AnswerError if it says neither yes nor no, or both."""
    said = set(re.findall(r"\b(yes|no)\b", text.lower()))
    if len(said) != 1:
        raise AnswerError(f"the answer must be yes or no, got {' '.join(text.split())[:80]!r}")
    return said == {"yes"}


def _labelled(text: str, label: str, low: float, high: float, whole: bool) -> float:
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
