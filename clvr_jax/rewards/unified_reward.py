"""UnifiedReward and UnifiedReward-Edit over any vision-language model: an endpoint, or our own Qwen3-VL.

One user turn, pictures first, then text, greedy. The questions are in our words around the published fields; answers
are read strictly: a field that is missing, said twice or out of range makes the picture unmarked, never bad.

Source: UnifiedReward 2.0 (arXiv 2503.05236) and UnifiedReward-Edit, the answers that their checkpoints were taught.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from clvr_jax.errors import UsageError
from clvr_jax.image_io import ImageLike
from clvr_jax.interfaces import ChatModel, ChatRequest, ProviderError
from clvr_jax.reasoning.answers import AnswerError, read_json_object
from clvr_jax.rewards.reward import EditJudge, Marks, PictureJudge, is_of_one_answer, problem_of

AXES = ("Alignment", "Coherence", "Style")
_NUMBER = r"(\d+(?:\.\d+)?)(?![\d.]*\d)"

_ACS = """You see a generated picture and the caption that it was made for. Rate the picture on three axes from 1 to 5:
- Alignment Score: does it show what the caption says?
- Coherence Score: does it hold together, without glitches or distorted objects?
- Style Score: how pleasing is it, whatever the caption says?

Answer in this form:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Text Caption: [{text}]"""
_FINAL = """You see a generated picture and the caption that it was made for. Rate it from 1 to 5 by two criteria: how
well it agrees with the caption (objects, numbers, colors, places, relations), and its quality (clarity, no artifacts).

End your answer with one line in this form:
Final Score: X

Text Caption: [{text}]"""
_EDIT = """You see two pictures: the first is the source, the second an edited version of it. Give two scores from 0 to
25. The first says how well the instruction was carried out: 0 not at all, 25 perfectly. The second says how little else
was changed: 0 a completely different picture, 25 the least edit that does it.

Answer with one JSON object: {{"reasoning": "...", "score": [success, minimality]}}

Editing instruction: {text}"""
_QUALITY = """You see a picture that was made by editing another. Give two scores from 0 to 25. The first says how
natural it looks: 0 wrong light, shadows or distances, 25 as if nothing had been edited. The second says how free of
artifacts it is: 0 distorted or blurred everywhere, 25 none to be seen.

Answer with one JSON object: {"reasoning": "...", "score": [naturalness, artifacts]}"""


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge asks about one picture, and what follows from as many answers; "" is one that is none."""

    questions: Sequence[ChatRequest]
    read: Callable[[Sequence[str]], Marks]


class UnifiedReward(PictureJudge):
    """R_T2I in [0, 1]; public attribute: `model`.

    Args:
      model: that answers, from several threads at once.
      form: "acs" asks for alignment, coherence and style, the value is (mean - 1) / 4; "final" for one score.
      max_tokens: of an answer.
    """

    def __init__(self, model: ChatModel, form: Literal["acs", "final"] = "acs", max_tokens: int = 512):
        if form not in ("acs", "final"):
            raise UsageError(f"UnifiedReward: form must be acs or final, got {form!r}")
        self.model, self._max_tokens = model, max_tokens
        self._text, self._read = {"acs": (_ACS, read_acs), "final": (_FINAL, read_final)}[form]

    def picture(self, picture: ImageLike, text: str) -> Marks:
        """See `PictureJudge`."""
        return _asked(self.model, self.inquiry(picture, text))

    def inquiry(self, picture: ImageLike, text: str) -> JudgePrompt:
        """For `picture`, by those who ask about many together."""
        question = _question(self._text.format(text=text), (picture,), self._max_tokens)
        return JudgePrompt([question], lambda answers: self._read(answers[0]))


class UnifiedRewardEdit(EditJudge):
    """R_I2I in [0, 1]: (.6 success + .4 minimality) / 25; public attribute: `model`.

    Args:
      model, max_tokens: see `UnifiedReward`.
      quality: weight of a second question about the edited picture alone, (naturalness + artifacts) / 50; 0 leaves it
        out.
    """

    def __init__(self, model: ChatModel, quality: float = 0.0, max_tokens: int = 512):
        if not 0 <= quality <= 1:
            raise UsageError(f"UnifiedRewardEdit: quality must lie in [0, 1], got {quality}")
        self.model, self._quality, self._max_tokens = model, quality, max_tokens

    def edit(self, source: ImageLike, edited: ImageLike, instruction: str) -> Marks:
        """See `EditJudge`."""
        return _asked(self.model, self.inquiry(source, edited, instruction))

    def inquiry(self, source: ImageLike, edited: ImageLike, instruction: str) -> JudgePrompt:
        """For `edit`, by those who ask about many together."""
        made = _question(_EDIT.format(text=instruction), (source, edited), self._max_tokens, is_json=True)
        if self._quality == 0:
            return JudgePrompt([made], lambda answers: read_edit(answers[0]))
        looks = _question(_QUALITY, (edited,), self._max_tokens, is_json=True)
        return JudgePrompt([made, looks], self._both)

    def _both(self, answers: Sequence[str]) -> Marks:
        made, looks = read_edit(answers[0]), read_quality(answers[1])
        value = (1 - self._quality) * made.value + self._quality * looks.value
        return Marks(value, {**made.parts, **looks.parts})


def _question(text: str, pictures: Sequence[ImageLike], max_tokens: int, is_json: bool = False) -> ChatRequest:
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    return ChatRequest([{"role": "user", "content": content}], pictures, max_tokens, is_json=is_json)


def _asked(model: ChatModel, inquiry: JudgePrompt) -> Marks:
    try:
        answers = [model.chat(question).text for question in inquiry.questions]
    except ProviderError as error:
        if is_of_one_answer(error):
            return Marks(math.nan, problem=problem_of(error))
        raise
    return read_marks(inquiry, answers)


def read_marks(inquiry: JudgePrompt, answers: Sequence[str]) -> Marks:
    """Reads the answers to an inquiry; marks that are not a number say whether there was no reply or no mark in it."""
    marks = inquiry.read(answers)
    if not math.isnan(marks.value):
        return marks
    return replace(marks, problem="unreadable" if all(answer.strip() for answer in answers) else "no_reply")


def read_acs(answer: str) -> Marks:
    """`Alignment Score (1-5): x` and so on, each once -> (mean - 1) / 4; parts are the scores as given."""
    scores = {axis.lower(): _field(answer, rf"{axis} Score \(1-5\): *") for axis in AXES}
    return Marks((sum(scores.values()) / len(scores) - 1) / 4, scores)


def read_final(answer: str) -> Marks:
    """`Final Score: x`, once -> (x - 1) / 4."""
    score = _field(answer, r"Final Score: *")
    return Marks((score - 1) / 4, {"final": score})


def read_edit(answer: str) -> Marks:
    """{"score": [success, minimality]} -> (.6 success + .4 minimality) / 25."""
    success, minimality = _pair(answer)
    return Marks((0.6 * success + 0.4 * minimality) / 25, {"success": success, "minimality": minimality})


def read_quality(answer: str) -> Marks:
    """{"score": [naturalness, artifacts]} -> their sum / 50."""
    naturalness, artifacts = _pair(answer)
    return Marks((naturalness + artifacts) / 50, {"naturalness": naturalness, "artifacts": artifacts})


def _field(answer: str, label: str) -> float:
    """The number in 1..5 behind a label that occurs once, else NaN."""
    found = re.findall(label + _NUMBER, answer)
    if len(found) != 1 or len(re.findall(label, answer)) != 1 or not 1 <= float(found[0]) <= 5:
        return math.nan
    return float(found[0])


def _pair(answer: str) -> tuple[float, float]:
    """The two numbers in 0..25 under "score" of the JSON object in an answer, else NaN."""
    try:
        score: Any = read_json_object(answer).get("score")
    except AnswerError:
        return math.nan, math.nan
    numbers = [one for one in score if type(one) in (int, float)] if isinstance(score, list) else []
    if len(numbers) != 2 or len(numbers) != len(score) or not all(0 <= one <= 25 for one in numbers):
        return math.nan, math.nan
    return float(numbers[0]), float(numbers[1])
