"""The prompts of a run: read from a file, without those that are empty, too long, duplicates or evaluation prompts.

Near duplicates of evaluation prompts are refused as well. They are found by their character 5-grams, which work alike
in every script. Refused prompts are counted, like those that are discarded later.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JsonObject, check_unicode, parse_object, shown, stream_lines

MAX_CHARACTERS = 8000
"""Maximum length of a prompt in characters; longer ones are refused, because image models do not take them."""

_NGRAM = 5
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Refused:
    """A prompt that is not used.

    Attributes:
      item: the prompt.
      reason: "empty", "too long", "duplicate" or "evaluation prompt".
    """

    item: PromptItem
    reason: str


class EvaluationPrompts:
    """A set of prompts that must not occur in training data, near duplicates included.

    Args:
      prompts: all evaluation prompts.
      threshold: smallest Jaccard index of the 5-grams of two prompts, in (0, 1], at which they count as equal.
    Raises: ClvrError if the threshold is out of range.
    """

    def __init__(self, prompts: Iterable[str], threshold: float = 0.8):
        if not 0 < threshold <= 1:
            raise ClvrError(f"near-duplicates: the threshold must be in (0, 1], got {threshold}")
        self._threshold = threshold
        self._ngrams: list[frozenset[str]] = []
        self._index: dict[str, list[int]] = defaultdict(list)
        for text in dict.fromkeys(normalized(prompt) for prompt in prompts):
            for ngram in ngrams(text):
                self._index[ngram].append(len(self._ngrams))
            self._ngrams.append(ngrams(text))

    def __len__(self) -> int:
        return len(self._ngrams)

    def __contains__(self, prompt: str) -> bool:
        """Returns whether `prompt` is one of the evaluation prompts, or nearly one."""
        own = ngrams(normalized(prompt))
        shared = Counter(number for ngram in own for number in self._index.get(ngram, ()))
        return any(
            common >= self._threshold * (len(own) + len(self._ngrams[number]) - common)
            for number, common in shared.items()
        )


def normalized(prompt: str) -> str:
    """Returns a prompt in the form in which two are compared: without case, punctuation, spaces, character variants."""
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(re.findall(r"\w+", folded))


def ngrams(text: str) -> frozenset[str]:
    """Returns the 5-grams of a text by characters; the text itself if it is shorter."""
    return frozenset(text[start : start + _NGRAM] for start in range(max(len(text) - _NGRAM + 1, 1)))


def filter_prompts(
    items: Iterable[PromptItem], evaluation: EvaluationPrompts, max_characters: int = MAX_CHARACTERS
) -> Iterator[PromptItem | Refused]:
    """Yields each item, or the reason why it is refused, in order.

    Args:
      items: the prompts.
      evaluation: prompts that must not be used.
      max_characters: maximum length of a prompt.
    Raises: ClvrError if two different prompts have the same id.
    """
    ids: dict[str, str] = {}
    texts: set[bytes] = set()
    for item in items:
        if ids.setdefault(item.id, item.prompt) != item.prompt:
            raise ClvrError(
                f"prompts: two prompts have the id {item.id!r}: {ids[item.id][:60]!r} and {item.prompt[:60]!r}"
            )
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
    """Yields the prompts of a file: JSON lines {"prompt", "id"?, "metadata"?}, or text with a prompt in each line.

    A missing id is derived from the prompt alone, so lines may be added or moved between runs.
    Raises: ClvrError, one line, if the file is missing, a line is invalid, or an id is no valid file name.
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
    """Returns a prompt as one line of a JSON lines file."""
    return json.dumps({"id": item.id, "prompt": item.prompt, "metadata": dict(item.metadata)})


def item_from_json(line: str) -> PromptItem:
    """Returns the prompt of a line that `item_to_json` wrote. Raises: ClvrError if the line is invalid."""
    return _item(line, "a line of prompts")


def _item(line: str | bytes, where: str) -> PromptItem:
    entry = parse_object(line, where)
    check_unicode(entry.content, where)
    prompt = entry.text("prompt")
    id = entry.optional("id", entry.text) if "id" in entry.content else None
    if id is not None and not _ID.fullmatch(id):
        raise ClvrError(
            f"{where}: the id {shown(id)} is no valid file name; use letters, digits, and . _ - between them"
        )
    metadata = entry.nested("metadata", JsonObject({}, where))
    return PromptItem(id or prompt_id(prompt), prompt, dict(metadata.content))


def prompt_id(prompt: str) -> str:
    """Returns an id that depends on the prompt alone."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
