"""What the data engine, rewards and judges ask of a vision-language model and of an image tool.

Every call is one question and blocks until it is answered; calls may come from many threads at once. A provider that
is faster with several at a time gathers them itself (`batching.Gathered`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning.context import Message
from clvr_jax.reasoning.images import Picture

Fault = Literal["down", "limited", "refused", "malformed", "rejected"]


class ProviderError(ClvrError):
    """A provider gave no usable answer, after all retries.

    fault: "down" (no connection, timeout, server error), "limited" (rate or quota), "refused" (its policy), "malformed"
    (an answer that is none: empty, no picture, wrong size), "rejected" (the request itself: key, model, size).
    usage: what the call cost all the same; a refusal and a useless answer are paid for like any other.
    """

    def __init__(self, message: str, fault: Fault, usage: "Usage | None" = None):
        super().__init__(message)
        self.fault, self.usage = fault, usage or Usage()

    def __reduce__(self) -> "tuple[type[ProviderError], tuple[str, Fault, Usage]]":
        # Workers in other processes send errors back; by default only the message would travel.
        return type(self), (str(self), self.fault, self.usage)


@dataclass(frozen=True)
class Usage:
    """What calls cost.

    calls: of `ask` or `draw`. retries: requests made beyond the first of each call. seconds: from question to answer,
    with all waiting. dollars: by the provider's price list, 0 where it has none. nfe: of our own image tool.
    """

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    pictures: int = 0
    nfe: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
    retries: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            pictures=self.pictures + other.pictures,
            nfe=self.nfe + other.nfe,
            seconds=self.seconds + other.seconds,
            dollars=self.dollars + other.dollars,
            retries=self.retries + other.retries,
        )


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    text: as it stands in the answer. logprob: natural logarithm of its probability. top: text -> logprob of the
    likeliest tokens at its position, the chosen one among them if it is one of them.
    """

    text: str
    logprob: float
    top: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A chat that waits for the model's next turn.

    messages: text and {"type": "image"} parts, see `reasoning.context`. images: one for each of those parts, in order.
    max_tokens: of the answer. temperature: 0 is greedy. seed: 31-bit; the same question with another seed may be
    answered otherwise. is_json: one JSON object is asked for; providers that can, enforce it. Who asks reads the answer
    all the same (`answers.read_json_object`), and may ask again. top_logprobs: how many of the likeliest tokens the
    answer's tokens come with, 0 for no tokens; a provider that has no probabilities answers without.
    """

    messages: Sequence[Message]
    images: Sequence[Picture] = field(default=(), repr=False)
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    is_json: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class Answer:
    """The model's turn, and what it cost. tokens: of the text, None unless they were asked for and exist."""

    text: str
    usage: Usage = Usage()
    tokens: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class ImageTask:
    """A picture to be made: from words alone, or by an edit of `references`.

    size: (height, width) in pixels, the tool's own if None.
    """

    prompt: str
    references: Sequence[Picture] = field(default=(), repr=False)
    size: tuple[int, int] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """A picture, and what it cost."""

    image: Picture = field(repr=False)
    usage: Usage = Usage()


class VisionLanguageModel(Protocol):
    """Reads pictures and text, answers with text."""

    @property
    def name(self) -> str:
        """Model and revision, recorded with what it said."""
        ...

    def ask(self, question: Question) -> Answer:
        """One answer. Raises: ProviderError."""
        ...

    def ask_all(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in order; models that are quicker with many together have their own way. Raises: ProviderError."""
        return [self.ask(question) for question in questions]


class ImageTool(Protocol):
    """Draws and edits pictures."""

    @property
    def name(self) -> str:
        """Model and revision, recorded with what it drew."""
        ...

    def draw(self, task: ImageTask) -> Made:
        """One picture. Raises: ProviderError."""
        ...
