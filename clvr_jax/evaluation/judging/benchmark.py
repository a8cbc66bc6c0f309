"""Benchmarks whose images a vision-language model scores, by its answers to questions about them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from clvr_jax.evaluation.harness.benchmark import Benchmark, Item, Score
from clvr_jax.evaluation.judging.official import OfficialPrompt
from clvr_jax.evaluation.judging.replies import probability
from clvr_jax.files.image_io import EncodedImage, read_encoded

Answer = TypeVar("Answer")
"""The type of a parsed reply."""


@dataclass(frozen=True)
class JudgeQuestion(Generic[Answer]):
    """A question to a judge about one image.

    Attributes:
      name: unique among the questions about the image.
      text: the question.
      read: parses a reply; raises AnswerError for one that it cannot parse.
      max_tokens: of the reply.
      is_json: whether the reply must be one JSON object.
      system: system prompt; "" for none.
      image_first: whether the image comes before the text.
      words: in lower case. If given, `read` gets the probability that the reply begins with one of them, as `repr`
        writes it, in place of the reply.
    """

    name: str
    text: str
    read: Callable[[str], Answer]
    max_tokens: int
    is_json: bool = False
    system: str = ""
    image_first: bool = True
    words: tuple[str, ...] = ()


def probability_question(name: str, text: str, words: tuple[str, ...]) -> JudgeQuestion[float]:
    """Returns a question whose answer is the probability of a reply that begins with one of the words."""
    return JudgeQuestion(name, text, probability, 16, words=words)


class JudgedBenchmark(Benchmark, Generic[Answer]):
    """A benchmark whose images a vision-language model judges.

    rubrics: names of our prompt templates for the judge. official: the prompt of the benchmark's own script; None if it
    is computed by code, or if there is none.
    """

    rubrics: ClassVar[tuple[str, ...]]
    official: ClassVar[OfficialPrompt | None] = None

    @property
    def attempts(self) -> int:
        """The maximum number of times that a question is asked until its reply can be parsed."""
        return 3

    @abc.abstractmethod
    def questions(self, item: Item) -> list[JudgeQuestion[Answer]]:
        """Returns the questions about each image of a prompt; none if the rules leave the prompt out."""

    def official_names(self, item: Item, question: JudgeQuestion[Answer]) -> dict[str, object]:
        """Returns the variables of the script from which its prompt about an image is made."""
        return {"prompt_data": item.record}

    @abc.abstractmethod
    def score(self, item: Item, answers: Mapping[str, Answer | None]) -> Score:
        """Returns the score of an image. answers: name of a question -> parsed reply, None if it has no valid reply."""

    def judge_image(self, path: Path, sample: int, samples: int) -> EncodedImage:
        """Returns the image that the judge sees for an image file."""
        return read_encoded(path)


def rubric(name: str) -> str:
    """Returns the text of a rubric, with its fields in braces."""
    return (
        resources.files("clvr_jax.evaluation.benchmarks").joinpath("rubrics", f"{name}.md").read_text(encoding="utf-8")
    )
