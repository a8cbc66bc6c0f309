"""Questions of a judge to a vision-language model: an endpoint, or a Qwen3-VL of this package.

A judge is a prompt and a parser of replies. Replies are parsed strictly: if a field is missing, occurs twice or is out
of range, the image has no score.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from typing_extensions import override

from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces import ChatModel, ChatRequest, ProviderError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.rewards.reward import EditJudge, ImageJudge, Score, is_single_reply_error, problem_from_error


@dataclass(frozen=True)
class JudgePrompt:
    """The questions of a judge about one image.

    Attributes:
      model: the model that is asked.
      questions: the requests.
      read: parses the replies, one for each question ("" if there is none), into a score, or into the questions that
        follow from them. It raises AnswerError for replies that cannot be parsed, or returns NaN.
    """

    model: ChatModel
    questions: Sequence[ChatRequest]
    read: Callable[[Sequence[str]], Score | JudgePrompt]


class PromptedImageJudge(ImageJudge):
    """A judge of images that asks a vision-language model, which is called from several threads at once."""

    @abc.abstractmethod
    def judge_prompt(self, image: ImageLike, text: str) -> JudgePrompt:
        """Returns the questions of `score_image`, for callers that batch the questions about many images."""

    @override
    def score_image(self, image: ImageLike, text: str) -> Score:
        return ask(self.judge_prompt(image, text))


class PromptedEditJudge(EditJudge):
    """A judge of edits that asks a vision-language model, which is called from several threads at once."""

    @abc.abstractmethod
    def judge_prompt(self, source: ImageLike, edited: ImageLike, instruction: str) -> JudgePrompt:
        """Returns the questions of `score_edit`, for callers that batch the questions about many images."""

    @override
    def score_edit(self, source: ImageLike, edited: ImageLike, instruction: str) -> Score:
        return ask(self.judge_prompt(source, edited, instruction))


def question(text: str, images: Sequence[ImageLike], max_tokens: int, is_json: bool = False) -> ChatRequest:
    """Returns a question of one user turn, images first, then text, decoded greedily."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return ChatRequest([{"role": "user", "content": content}], images, max_tokens, is_json=is_json)


def ask(judge_prompt: JudgePrompt) -> Score:
    """Asks the questions of a prompt, and those that follow from them, one after the other.

    Raises: ProviderError if the model cannot be reached; a refusal and an empty reply are scores with a problem.
    """
    found: Score | JudgePrompt = judge_prompt
    while isinstance(found, JudgePrompt):
        try:
            answers = [found.model.chat(request).text for request in found.questions]
        except ProviderError as error:
            if is_single_reply_error(error):
                return Score(math.nan, problem=problem_from_error(error))
            raise
        found = read_replies(found, answers)
    return found


def read_replies(judge_prompt: JudgePrompt, answers: Sequence[str]) -> Score | JudgePrompt:
    """Parses the replies to the questions of a prompt.

    Args:
      judge_prompt: the questions.
      answers: one reply for each question; "" if there is none.
    Returns: the score, or the questions that follow. A score that is NaN has a reason, and the problem "no_reply" or
      "unreadable".
    """
    try:
        found = judge_prompt.read(answers)
    except AnswerError as error:
        found = Score(math.nan, reason=str(error))
    if isinstance(found, JudgePrompt) or not math.isnan(found.value):
        return found
    if not all(answer.strip() for answer in answers):
        return replace(found, problem="no_reply", reason="the reply is empty")
    reason = found.reason or f"no score in the reply {' '.join(' '.join(answers).split())[:80]!r}"
    return replace(found, problem="unreadable", reason=reason)
