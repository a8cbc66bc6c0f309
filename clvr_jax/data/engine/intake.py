"""Which prompts are worked on: read from a file, cleaned of what is empty, too long, doubled or kept for evaluation.

A prompt counts as an evaluation prompt also if it is nearly one: its five-letter pieces are compared, which works alike
in every script. What is refused is counted, like everything that is discarded later.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clvr_jax.data.engine.roles import PromptItem
from clvr_jax.errors import ClvrError
from clvr_jax.json_input import JsonObject, check_unicode, parse_object, shown, stream_lines

MAX_CHARACTERS = 8000
"""Of a prompt; longer ones are refused. Image tools take no more."""

_PIECE = 5
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Refused:
    """A prompt that is not worked on. reason: "empty", "too long", "duplicate" or "evaluation prompt"."""

    item: PromptItem
    reason: str


class EvaluationPrompts:
    """Prompts that must not be learned from.

    Args:
      prompts: all of them.
      threshold: share of pieces that two prompts have in common (Jaccard index) from which on they count as the same.
    """

    def __init__(self, prompts: Iterable[str], threshold: float = 0.8):
        if not 0 < threshold <= 1:
            raise ClvrError(f"near-duplicates: the threshold must lie in (0, 1], got {threshold}")
        self._threshold = threshold
        self._pieces: list[frozenset[str]] = []
        self._holders: dict[str, list[int]] = defaultdict(list)
        for text in dict.fromkeys(normalized(prompt) for prompt in prompts):
            for piece in pieces(text):
                self._holders[piece].append(len(self._pieces))
            self._pieces.append(pieces(text))

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, prompt: str) -> bool:
        """Whether it is one of them, or nearly."""
        own = pieces(normalized(prompt))
        shared = Counter(number for piece in own for number in self._holders.get(piece, ()))
        return any(
            common >= self._threshold * (len(own) + len(self._pieces[number]) - common)
            for number, common in shared.items()
        )


def normalized(prompt: str) -> str:
    """A prompt without what does not count when two are compared: case, forms of characters, punctuation, spaces."""
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(re.findall(r"\w+", folded))


def pieces(text: str) -> frozenset[str]:
    """All runs of five characters; the text itself if it is shorter."""
    return frozenset(text[start : start + _PIECE] for start in range(max(len(text) - _PIECE + 1, 1)))


def sift(
    items: Iterable[PromptItem], evaluation: EvaluationPrompts, max_characters: int = MAX_CHARACTERS
) -> Iterator[PromptItem | Refused]:
    """Each item, or why it is refused; in order, one at a time.

    Raises: ClvrError if two items have one id.
    """
    ids: dict[str, str] = {}
    texts: set[bytes] = set()
    for item in items:
        if ids.setdefault(item.id, item.prompt) != item.prompt:
            raise ClvrError(f"prompts: two have the id {item.id!r}: {ids[item.id][:60]!r} and {item.prompt[:60]!r}")
        text = normalized(item.prompt)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if not text:
            yield Refused(item, "empty")
        elif len(item.prompt) > max_characters:
            yield Refused(item, "too long")
        elif digest in texts:
            yield Refused(item, "duplicate")
        elif item.prompt in evaluation:
            yield Refused(item, "evaluation prompt")
        else:
            yield item
        texts.add(digest)


def read_prompts(path: Path) -> Iterator[PromptItem]:
    """The prompts of a file: JSON lines {"prompt", "id"?, "metadata"?}, or plain text with a prompt in each line.

    An id that is not given depends on the prompt alone, so lines may be added or moved between runs.
    Raises: ClvrError, one line, if the file is missing, a line is none of these, or an id cannot name a file.
    """
    is_json = path.suffix in (".jsonl", ".json")
    for where, line in stream_lines(path, advice="give a file with a prompt in each line"):
        if is_json:
            if line.strip():
                yield _item(line, where)
            continue
        try:
            prompt = line.decode()
        except UnicodeDecodeError as error:
            raise ClvrError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
        yield PromptItem(prompt_id(prompt), prompt)


def item_to_json(item: PromptItem) -> str:
    """One line of a file of prompts."""
    return json.dumps({"id": item.id, "prompt": item.prompt, "metadata": dict(item.metadata)})


def item_from_json(line: str) -> PromptItem:
    """The inverse. Raises: ClvrError for a line that is none."""
    return _item(line, "a line of prompts")


def _item(line: str | bytes, where: str) -> PromptItem:
    entry = parse_object(line, where)
    check_unicode(entry.content, where)
    prompt = entry.text("prompt")
    id = entry.optional("id", entry.text) if "id" in entry.content else None
    if id is not None and not _ID.fullmatch(id):
        raise ClvrError(f"{where}: the id {shown(id)} cannot name a file; use letters, digits, and . _ - between them")
    metadata = entry.nested("metadata", JsonObject({}, where))
    return PromptItem(id or prompt_id(prompt), prompt, dict(metadata.content))


def prompt_id(prompt: str) -> str:
    """An id that depends on the prompt alone."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
