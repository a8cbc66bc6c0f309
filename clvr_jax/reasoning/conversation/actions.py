"""The controller's replies: their contract, the system prompt that explains it, and the parser.

A reply is reasoning text followed by exactly one action token: `<|image_gen|>` (generate or edit) or `<|terminate|>`
(stop). Once an image exists, the reasoning holds one sentence `Unmet: a; b.` (or `Unmet: nothing.`), the verdict on the
latest image. A reply that breaks these rules raises ParseError; it never counts as an accept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from clvr_jax.errors import ClvrError

IMAGE_GEN = "<|image_gen|>"
TERMINATE = "<|terminate|>"
ACTIONS = (IMAGE_GEN, TERMINATE)

SYSTEM_PROMPT_VERSION = 2
"""Goes up with every change of SYSTEM_PROMPT and is recorded with each trajectory."""

SYSTEM_PROMPT = """\
You direct a painter who draws and edits pictures. You see the request and every picture so far; the painter sees the \
request, everything you wrote and every picture so far. You work in steps until the latest picture meets the request.

Before there is a picture:
- Write "Plan:" and list every single thing the request asks for - each object with its color, count and place, each \
relation, each text - as short items with a semicolon between them and a period at the end.
- Then tell the painter what to draw first. Leave nothing to guess.

When there is a picture, look at the latest one only:
- Write "I see" and describe what is really there, not what was asked for.
- Write one sentence "Unmet: ..." that lists each item of the plan the picture does not meet, in the words of the \
plan, with a semicolon between items and a period at the end. Things that must not be there are items too: "no \
dog left". If every item is met, write "Unmet: nothing."
- Judge strictly: an item you cannot see clearly is unmet. Do not invent new wishes.
- An inspector's report may stand beside the latest picture. Then rely on it: describe what it describes, and what it \
lists as unmet is unmet.
- If something is unmet, tell the painter what to change, one or two changes at a time, and say what must stay as it is.

End every reply with exactly one of these tokens and nothing after it:
<|image_gen|>  the painter draws or edits now
<|terminate|>  you stop: either nothing is unmet, or you are sure that no further edit would help

Example of a first reply:
Plan: two red apples; a blue bowl; apples left of the bowl. Draw two red apples side by side on the left half of a \
wooden table and one blue bowl on the right half.<|image_gen|>
Example of a later reply:
I see one red apple left of a blue bowl. Unmet: two red apples. Add a second red apple next to the first one and keep \
everything else.<|image_gen|>
Example of a last reply:
I see two red apples left of a blue bowl. Unmet: nothing.<|terminate|>
"""
"""Explains the contract to a general-purpose vision-language model; controllers trained on it need no system prompt."""

GIVEN_IMAGES_PROMPT = """
The user's own images stand in front of the request, and the painter has them too, in the same order. They are \
references and not pictures of the painter's: do not judge them. Say which of them is edited or used, and for what.
"""
"""Follows `SYSTEM_PROMPT` in a loop that starts from images of the user's own."""

END_OF_TURN = ("<|im_end|>", "<|endoftext|>")
"""Tokens after which a model's turn ends; they are no part of a reply."""
_BOLD = r"\*{0,2}"
_SENTENCE_END = r"(?:\.(?=\s|$)|\n|$)"
_UNMET = re.compile(rf"(?<![\w<]){_BOLD}Unmet{_BOLD}:{_BOLD}[ \t]*(?P<items>.*?){_SENTENCE_END}")
_PLAN = re.compile(rf"(?<![\w<]){_BOLD}Plan{_BOLD}:{_BOLD}[ \t]*(?P<items>.*?){_SENTENCE_END}")
_NOTHING = frozenset({"nothing", "none"})


NO_IMAGE = -1
"""The step number of the first reply, which judges no image."""


class ParseError(ClvrError):
    """A reply that breaks the contract; the message says how."""


@dataclass(frozen=True)
class Reply:
    """A controller's reply that keeps the contract.

    Attributes:
      reasoning: the text before the action token, without surrounding white space.
      action: IMAGE_GEN or TERMINATE.
      unmet: what the latest image lacks, () if nothing; None in a reply before the first image.
    """

    reasoning: str
    action: str
    unmet: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ParseError(f"controller reply: action must be one of {', '.join(ACTIONS)}, got {self.action!r}")

    @property
    def text(self) -> str:
        """The reply in a conversation: reasoning and action token."""
        return self.reasoning + self.action


@dataclass(frozen=True)
class PendingReply:
    """A reply whose images are still to be generated.

    Attributes:
      reply: what the controller replied.
      attempts: how many replies were sampled until one could be parsed; 0 if the user wrote it.
      redraw: how many images were generated from this reply before.
    """

    reply: Reply
    attempts: int = 1
    redraw: int = 0


def parse(text: str, has_image: bool) -> Reply:
    """Reads a controller's reply.

    Args:
      text: the raw reply; end-of-turn tokens after the action are ignored.
      has_image: whether the controller saw an image, so that a verdict (`Unmet: ...`) is due.
    Returns: the reply; `unmet` is None exactly if `has_image` is false.
    Raises: ParseError for no action token or more than one, text after it, no instruction, and, when an
      image exists, for no verdict, two verdicts, an empty one, or one that says "nothing" next to other items.
    """
    for token in END_OF_TURN:
        text = text.replace(token, "")
    found = re.findall("|".join(map(re.escape, ACTIONS)), text)
    if not found:
        raise ParseError(f"controller reply: no action token at the end of {_short(text)}")
    if len(found) > 1:
        raise ParseError(f"controller reply: {len(found)} action tokens instead of one in {_short(text)}")
    action = found[0]
    reasoning, _, rest = text.partition(action)
    reasoning = reasoning.strip()
    if rest.strip():
        raise ParseError(f"controller reply: text after {action}: {_short(rest)}")
    if not has_image:
        if action == IMAGE_GEN and not reasoning:
            raise ParseError(f"controller reply: {action} without an instruction")
        return Reply(reasoning, action)
    return Reply(reasoning, action, _unmet(reasoning))


def unmet_span(reasoning: str) -> tuple[int, int] | None:
    """Returns (start, end) of the sentence `Unmet: ...` in a reasoning text, or None."""
    match = _UNMET.search(reasoning)
    return match.span() if match else None


def plan_items(reasoning: str) -> tuple[str, ...]:
    """Returns the items of the sentence `Plan: a; b.`; () if there is none."""
    match = _PLAN.search(reasoning)
    return tuple(_split(match["items"])) if match else ()


def strip_action(reply: str) -> str:
    """Returns a reply without its action token and surrounding white space."""
    for action in ACTIONS:
        reply = reply.replace(action, "")
    return reply.strip()


def _unmet(reasoning: str) -> tuple[str, ...]:
    sentences = _UNMET.findall(reasoning)
    if not sentences:
        raise ParseError(
            f"controller reply: an image exists but there is no sentence `Unmet: ...` in {_short(reasoning)}"
        )
    if len(sentences) > 1:
        raise ParseError(
            f"controller reply: {len(sentences)} sentences `Unmet: ...` instead of one in {_short(reasoning)}"
        )
    items = _split(sentences[0])
    if not items:
        raise ParseError(f"controller reply: `Unmet:` lists nothing, not even the word, in {_short(reasoning)}")
    says_nothing = [item for item in items if item.lower() in _NOTHING]
    if says_nothing and len(items) > 1:
        raise ParseError(f"controller reply: `Unmet:` says {says_nothing[0]!r} and other items in {_short(reasoning)}")
    return () if says_nothing else tuple(items)


def _split(items: str) -> list[str]:
    return [item for item in (part.strip().strip("*").strip() for part in items.split(";")) if item]


def _short(text: str, limit: int = 100) -> str:
    """One line that quotes the end of a text, where the action token should be."""
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else "... " + text[-limit:])
