"""FIRM, reward models of faithful generation and editing, on any vision-language model.

The wording of the questions is that of this package around the published fields.

Source: "Trust Your Critic" (arXiv 2603.12247) and github.com/VisionXLab/FIRM-Reward, whose checkpoints FIRM-Gen-8B and
FIRM-Edit-8B, Qwen3-VL models, were trained on these replies.
"""

import re
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from clvr_jax.errors import UsageError
from clvr_jax.files.image_io import ImageLike
from clvr_jax.interfaces import ChatModel
from clvr_jax.interfaces.answers import AnswerError, read_json_object
from clvr_jax.rewards.judge_prompt import JudgePrompt, PromptedEditJudge, PromptedImageJudge, question
from clvr_jax.rewards.reward import Score

LOOKS = ("aesthetics", "quality", "structure")
"""The scores of FIRM's question about an image alone, in the order of its reply."""

_ALIGNMENT = r"""You see a generated image. Judge strictly how well it shows what its prompt asks for.

1. Look at the whole image first.
2. List all requirements of the prompt, explicit and implicit: subjects, attributes, actions, relations, style,
composition, and what must not be there.
3. Check them one by one.
4. Rate the image: 5, all requirements are met; 4, the main content is right, one or two details are off; 3, the main
subjects are there, several requirements are not met; 2, most main subjects are missing or wrong; 1, the image has
nothing to do with the prompt.

Answer in plain text, in this form:
1. **(requirement)**:
- (analysis)

**Final Analysis**:
(one paragraph)

**Final Alignment Rating: X**
\boxed{{X}}

### Original Prompt
{text}"""
_LOOKS = """You see one generated image. Rate how it looks, from 1 (worst) to 5 (best), without regard to what it was
meant to show; judge stylized and fantastic scenes within their style.
- Aesthetics: composition, balance, colors, appeal.
- Quality: no noise, blur, compression, watermarks or other degradation.
- Structure and texture: geometry, anatomy, light, materials and details are right.

Answer with one JSON object: {"score": [aesthetics, quality, structure], "reasoning": "..."}"""
_CONSISTENCY = """You see an original image and a version of it that was edited by an instruction. Rate from 1 to 5
whether everything else stayed as it was; whether the instruction was carried out does not matter here.

Instruction: {text}

5: only what the instruction requires has changed; 4: one large unintended change or one or two small ones; 3: two or
three large or three or four small ones; 2: more than that; 1: it is a different image. What follows from the edit
itself is no unintended change: uncovered background, light and shadows, attributes of an object that replaces another.
Nor are small differences in sharpness, noise or color.

Answer with one JSON object: {{"reasoning": "...", "score": [X]}}"""
_EXECUTION = """You see an original image and a version of it that was edited by an instruction. Rate from 1 to 5
whether the instruction was carried out; other changes and the quality of the image do not matter here.

Instruction: {text}

5: every requested change is there and right; 4: all key changes are there, a subtle detail is missing; 3: the main
intent is there, a significant part is missing or wrong; 2: most is missing; 1: nothing that was requested can be seen.

Answer with one JSON object: {{"reasoning": "...", "score": [X]}}"""


class FirmGen(PromptedImageJudge):
    """Computes R_T2I in [0, 1]: alignment (1 - quality + quality x looks), each from 0 to 1.

    Alignment is (rating - 1) / 4, looks the lowest of three such scores of the image alone. The parts are the ratings.

    Attributes:
      model: the model.

    Args:
      model: a vision-language model, which is called from several threads at once.
      quality: share in [0, 1] of the score that depends on the looks; 0 omits the second question.
      max_tokens: maximum number of tokens of a reply. The first one lists the requirements of the prompt.
    Raises: UsageError for a share out of range.
    """

    def __init__(self, model: ChatModel, quality: float = 0.6, max_tokens: int = 2048):
        if not 0 <= quality <= 1:
            raise UsageError(f"FirmGen: quality must be in [0, 1], got {quality}")
        self.model, self._quality, self._max_tokens = model, quality, max_tokens

    @override
    def judge_prompt(self, image: ImageLike, text: str) -> JudgePrompt:
        questions = [question(_ALIGNMENT.format(text=text), (image,), self._max_tokens)]
        if self._quality > 0:
            questions.append(question(_LOOKS, (image,), self._max_tokens, is_json=True))
        return JudgePrompt(self.model, questions, self._read)

    def _read(self, answers: Sequence[str]) -> Score:
        alignment = read_alignment(answers[0])
        if self._quality == 0:
            return Score(_unit(alignment), {"alignment": alignment})
        looks = read_looks(answers[1])
        value = _unit(alignment) * (1 - self._quality + self._quality * _unit(min(looks)))
        return Score(value, {"alignment": alignment, **dict(zip(LOOKS, looks, strict=True))})


class FirmEdit(PromptedEditJudge):
    """Computes R_I2I in [0, 1]: execution (1 - consistency + consistency x consistency score), each from 0 to 1.

    An edit that was not carried out scores 0, however consistent the images are. The parts are the ratings, 1 to 5.

    Attributes:
      model: the model.

    Args:
      model: see `FirmGen`.
      consistency: share in [0, 1] of the score that depends on what else was changed; 0 omits that question.
      max_tokens: see `FirmGen`.
    Raises: UsageError for a share out of range.
    """

    def __init__(self, model: ChatModel, consistency: float = 0.4, max_tokens: int = 512):
        if not 0 <= consistency <= 1:
            raise UsageError(f"FirmEdit: consistency must be in [0, 1], got {consistency}")
        self.model, self._consistency, self._max_tokens = model, consistency, max_tokens

    @override
    def judge_prompt(self, source: ImageLike, edited: ImageLike, instruction: str) -> JudgePrompt:
        texts = [_EXECUTION, _CONSISTENCY] if self._consistency > 0 else [_EXECUTION]
        questions = [
            question(text.format(text=instruction), (source, edited), self._max_tokens, is_json=True) for text in texts
        ]
        return JudgePrompt(self.model, questions, self._read)

    def _read(self, answers: Sequence[str]) -> Score:
        execution = read_rating(answers[0])
        if self._consistency == 0:
            return Score(_unit(execution), {"execution": execution})
        consistency = read_rating(answers[1])
        value = _unit(execution) * (1 - self._consistency + self._consistency * _unit(consistency))
        return Score(value, {"execution": execution, "consistency": consistency})


def read_alignment(answer: str) -> float:
    r"""Parses `\boxed{x}`, once, with x from 1 to 5. A rating in words before it must agree.

    Raises: AnswerError, which says what is missing.
    """
    found = re.findall(r"\\boxed\s*\{+\s*\[?\s*([^{}\[\]]*?)\s*\]?\s*\}+", answer)
    if len(found) != 1:
        raise AnswerError(f"the reply must have one \\boxed{{1 to 5}}, got {len(found)}")
    if found[0] not in ("1", "2", "3", "4", "5"):
        raise AnswerError(f"the rating in \\boxed must be from 1 to 5, got {found[0][:40]!r}")
    stated = re.findall(r"Final Alignment Rating\W*(\d+)", answer)
    if any(one != found[0] for one in stated):
        raise AnswerError(f"the reply has two ratings, {stated[0][:40]} and {found[0]}")
    return float(found[0])


def read_looks(answer: str) -> tuple[float, float, float]:
    """Parses {"score": [aesthetics, quality, structure]}. Raises: AnswerError."""
    first, second, third = _ratings(answer, 3)
    return first, second, third


def read_rating(answer: str) -> float:
    """Parses {"score": [x]} or {"score": x}. Raises: AnswerError."""
    return _ratings(answer, 1)[0]


def _ratings(answer: str, count: int) -> list[float]:
    """Returns the whole numbers from 1 to 5 of "score" of the JSON object in a reply."""
    given: Any = read_json_object(answer).get("score")
    numbers = given if isinstance(given, list) else [given]
    ratings = [float(one) for one in numbers if type(one) in (int, float) and one in (1, 2, 3, 4, 5)]
    if not len(ratings) == len(numbers) == count:
        what = "a whole number" if count == 1 else f"{count} whole numbers"
        raise AnswerError(f"score must be {what} from 1 to 5, got {str(given)[:40]!r}")
    return ratings


def _unit(rating: float) -> float:
    """Returns a rating from 1 to 5 as a number from 0 to 1."""
    return (rating - 1) / 4
