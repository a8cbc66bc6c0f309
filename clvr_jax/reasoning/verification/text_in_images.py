"""Text in images: what a prompt quotes, whether an image says it, and a verifier that reads instead of asking.

A requirement `the image says "..."` is met if the quoted words are read in the image, whole words in this order. Upper
and lower case, punctuation and line breaks do not count, since lettering changes them freely.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.verification.verification import Requirement, Verification, Verifier

_QUOTED = re.compile(
    r'"([^"]+)"|\u201c([^\u201d]+)\u201d|\u201e([^\u201c]+)\u201c|\u00ab([^\u00bb]+)\u00bb|\u300c([^\u300d]+)\u300d'
)
_REQUIREMENT = re.compile(r'the image says "(.+)"', re.IGNORECASE | re.DOTALL)
# Each character of scripts without spaces is a word.
_WORD = re.compile(
    r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+"
)


@dataclass(frozen=True)
class TextLine:
    """A line of text in an image. text: what is read. confidence: of the reader, in [0, 1]."""

    text: str
    confidence: float


class TextReader(Protocol):
    """Reads text in images (OCR). It is called from many threads at once."""

    @property
    def name(self) -> str:
        """Model and version, recorded with what it read."""
        ...

    def read_text(self, image: ImageLike) -> tuple[TextLine, ...]:
        """Returns the lines of text in an image, from top to bottom; () if there is none."""
        ...


def quoted_texts(prompt: str) -> tuple[str, ...]:
    """Returns the texts between double quotes in a prompt that have a letter or digit, in order, each once."""
    found = [next(text for text in groups if text) for groups in _QUOTED.findall(prompt)]
    return tuple(dict.fromkeys(" ".join(text.split()) for text in found if _words(text)))


def text_requirement(text: str) -> str:
    """Returns the requirement that an image says a text."""
    return f'the image says "{text}"'


def required_text(requirement: str) -> str | None:
    """Returns the text of a requirement of `text_requirement`; None for any other requirement."""
    match = _REQUIREMENT.fullmatch(requirement.strip().rstrip("."))
    return match[1] if match and _words(match[1]) else None


def find_text(text: str, lines: Sequence[TextLine]) -> float | None:
    """Returns the least confidence of the lines that together say a text; None if they do not say it.

    The text must be a run of whole words, of which a reader may have split or joined some.
    """
    wanted = "".join(_words(text))
    words = [(word, line.confidence) for line in lines for word in _words(line.text)]
    for first in range(len(words)):
        joined, least = "", 1.0
        for word, confidence in words[first:]:
            joined, least = joined + word, min(least, confidence)
            if joined == wanted:
                return least
            if not wanted.startswith(joined):
                break
    return None


def text_accuracy(text: str, lines: Sequence[TextLine]) -> float:
    """Returns the share of letters of a text that the lines say, in [0, 1].

    It is 1 - edit distance / length, with the part of the lines that is nearest to the text; other text costs nothing.
    """
    wanted = "".join(_words(text))
    read = "".join(word for line in lines for word in _words(line.text))
    # Row i: least number of edits between the first i letters and any part of `read` that ends at j.
    row = [0] * (len(read) + 1)
    for index, letter in enumerate(wanted, 1):
        previous, row = row, [index]
        for j, other in enumerate(read, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (letter != other)))
    return 1 - min(row) / len(wanted)


class TextVerifier(Verifier):
    """A verifier that adds a requirement for every quoted text of a prompt, and checks these by reading the image.

    All other requirements, and what they are derived from, are another verifier's.

    Args:
      verifier: the other verifier.
      reader: reads the text in images.
    """

    def __init__(self, verifier: Verifier, reader: TextReader):
        self._verifier, self._reader = verifier, reader

    @property
    def name(self) -> str:
        """The names of verifier and reader."""
        return f"{self._verifier.name}, text by {self._reader.name}"

    @property
    def usage(self) -> Usage:
        """The usage of the other verifier; reading costs no tokens."""
        return getattr(self._verifier, "usage", Usage())

    @property
    def adapted(self) -> tuple[str, ...]:
        """What the requests of the other verifier lacked because its server refuses it."""
        return tuple(getattr(self._verifier, "adapted", ()))

    def derive(self, prompts: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the requirements of the other verifier, then `the image says "..."` for each quoted text."""
        found = []
        for prompt, derived in zip(prompts, self._verifier.derive(prompts), strict=True):
            known = {_key(text) for text in map(required_text, derived) if text}
            missing = [text for text in quoted_texts(prompt) if _key(text) not in known]
            found.append((*derived, *map(text_requirement, missing)))
        return found

    def check(self, requirements: Sequence[Sequence[str]], images: Sequence[ImageLike]) -> list[Verification]:
        """Checks every image against its requirements."""
        others = [[one for one in texts if required_text(one) is None] for texts in requirements]
        checked = self._verifier.check(others, images)
        found = []
        for texts, image, verification in zip(requirements, images, checked, strict=True):
            has_text = any(required_text(one) is not None for one in texts)
            lines = self._reader.read_text(image) if has_text else ()
            found.append(self._merged(texts, verification, lines))
        return found

    def check_plans(self, requirements: Sequence[Sequence[str]], plans: Sequence[str]) -> list[Verification]:
        """Checks plans in words: a plan says a text if the words are in it."""
        others = [[one for one in texts if required_text(one) is None] for texts in requirements]
        checked = self._verifier.check_plans(others, plans)
        return [
            self._merged(texts, verification, (TextLine(plan, 1.0),), is_plan=True)
            for texts, plan, verification in zip(requirements, plans, checked, strict=True)
        ]

    def verify(
        self,
        prompts: Sequence[str],
        images: Sequence[ImageLike],
        requirements: Sequence[Sequence[str]] | None = None,
    ) -> list[Verification]:
        """Checks every image against its prompt, as `ModelVerifier.verify`."""
        return self.check(self.derive(prompts) if requirements is None else requirements, images)

    def _merged(
        self, texts: Sequence[str], verification: Verification, lines: Sequence[TextLine], is_plan: bool = False
    ) -> Verification:
        others: Iterator[Requirement] = iter(verification.requirements)
        merged = tuple(
            next(others) if (text := required_text(one)) is None else _checked(one, text, lines, is_plan)
            for one in texts
        )
        return replace(verification, requirements=merged, verifier=self.name)


def _checked(requirement: str, text: str, lines: Sequence[TextLine], is_plan: bool) -> Requirement:
    confidence = find_text(text, lines)
    said = "; ".join(f'"{line.text}"' for line in lines) or "nothing"
    evidence = "the plan has the words" if is_plan and confidence else "not in the plan" if is_plan else f"read: {said}"
    return Requirement(requirement, confidence is not None, confidence or 0.0, evidence)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _key(text: str) -> str:
    return "".join(_words(text))
