"""UnifiedReward and UnifiedReward-Edit on any vision-language model: an endpoint, or a Qwen3-VL of this package.

The wording of the questions is that of this package around the published fields.

Source: UnifiedReward 2.0 (arXiv 2503.05236) and UnifiedReward-Edit, whose checkpoints were trained on these replies.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import override

from clvr_jax.errors import UsageError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces import ChatModel
from clvr_jax.interfaces.answers import AnswerError, read_json_object
from clvr_jax.rewards.judge_prompt import JudgePrompt, PromptedEditJudge, PromptedImageJudge, question
from clvr_jax.rewards.reward import Score

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


class UnifiedReward(PromptedImageJudge):
    """Computes R_T2I in [0, 1].

    Attributes:
      model: the model.

    Args:
      model: a vision-language model, which is called from several threads at once.
      form: "acs" requests scores of alignment, coherence and style, and the value is (mean - 1) / 4; "final" requests
        one score s, and the value is (s - 1) / 4.
      max_tokens: maximum number of tokens of a reply.
    Raises: UsageError for another form.
    """

    def __init__(self, model: ChatModel, form: Literal["acs", "final"] = "acs", max_tokens: int = 512):
        if form not in ("acs", "final"):
            raise UsageError(f"UnifiedReward: form must be acs or final, got {form!r}")
        self.model, self._max_tokens = model, max_tokens
        self._text, self._read = {"acs": (_ACS, read_acs), "final": (_FINAL, read_final)}[form]

    @override
    def judge_prompt(self, image: ImageLike, text: str) -> JudgePrompt:
        asked = question(self._text.format(text=text), (image,), self._max_tokens)
        return JudgePrompt(self.model, [asked], lambda answers: self._read(answers[0]))


class UnifiedRewardEdit(PromptedEditJudge):
    """Computes R_I2I in [0, 1]: (.6 success + .4 minimality) / 25.

    Attributes:
      model: the model.

    Args:
      model: see `UnifiedReward`.
      quality: weight in [0, 1] of a second question about the edited image alone, (naturalness + artifacts) / 50; 0
        omits the question.
      max_tokens: see `UnifiedReward`.
    Raises: UsageError for a weight out of range.
    """

    def __init__(self, model: ChatModel, quality: float = 0.0, max_tokens: int = 512):
        if not 0 <= quality <= 1:
            raise UsageError(f"UnifiedRewardEdit: quality must be in [0, 1], got {quality}")
        self.model, self._quality, self._max_tokens = model, quality, max_tokens

    @override
    def judge_prompt(self, source: ImageLike, edited: ImageLike, instruction: str) -> JudgePrompt:
        made = question(_EDIT.format(text=instruction), (source, edited), self._max_tokens, is_json=True)
        if self._quality == 0:
            return JudgePrompt(self.model, [made], lambda answers: read_edit(answers[0]))
        looks = question(_QUALITY, (edited,), self._max_tokens, is_json=True)
        return JudgePrompt(self.model, [made, looks], self._both)

    def _both(self, answers: Sequence[str]) -> Score:
        made, looks = read_edit(answers[0]), read_quality(answers[1])
        value = (1 - self._quality) * made.value + self._quality * looks.value
        return Score(value, {**made.parts, **looks.parts})


def read_acs(answer: str) -> Score:
    """Parses `Alignment Score (1-5): x` and so on, each once, into (mean - 1) / 4; the parts are the scores, 1 to 5."""
    scores = {axis.lower(): _field(answer, rf"{axis} Score \(1-5\): *") for axis in AXES}
    return Score((sum(scores.values()) / len(scores) - 1) / 4, scores)


def read_final(answer: str) -> Score:
    """Parses `Final Score: x`, once, into (x - 1) / 4."""
    score = _field(answer, r"Final Score: *")
    return Score((score - 1) / 4, {"final": score})


def read_edit(answer: str) -> Score:
    """Parses {"score": [success, minimality]} into (.6 success + .4 minimality) / 25."""
    success, minimality = _pair(answer)
    return Score((0.6 * success + 0.4 * minimality) / 25, {"success": success, "minimality": minimality})


def read_quality(answer: str) -> Score:
    """Parses {"score": [naturalness, artifacts]} into their sum / 50."""
    naturalness, artifacts = _pair(answer)
    return Score((naturalness + artifacts) / 50, {"naturalness": naturalness, "artifacts": artifacts})


def _field(answer: str, label: str) -> float:
    """Returns the number in 1..5 after a label that occurs once, else NaN."""
    found = re.findall(label + _NUMBER, answer)
    if len(found) != 1 or len(re.findall(label, answer)) != 1 or not 1 <= float(found[0]) <= 5:
        return math.nan
    return float(found[0])


def _pair(answer: str) -> tuple[float, float]:
    """Returns the two numbers in 0..25 of "score" of the JSON object in a reply, else NaN."""
    try:
        score: Any = read_json_object(answer).get("score")
    except AnswerError:
        return math.nan, math.nan
    numbers = [one for one in score if type(one) in (int, float)] if isinstance(score, list) else []
    if len(numbers) != 2 or len(numbers) != len(score) or not all(0 <= one <= 25 for one in numbers):
        return math.nan, math.nan
    return float(numbers[0]), float(numbers[1])
