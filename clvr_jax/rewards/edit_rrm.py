"""Edit-RRM, a reward model that reasons about an edit point by point, on any vision-language model.

A model writes about ten points that an edit must meet: what the instruction asks for, what must stay, and image
quality. The judge decides for each point whether it is met, and gives a final score from 0 to 10, which is not their
mean. The wording of the questions is that of this package around the published fields.

Source: "Leveraging Verifier-Based Reinforcement Learning in Image Editing" (Edit-R1, arXiv 2604.27505), appendix A.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from clvr_jax.files.image_io import ImageLike, pixels
from clvr_jax.interfaces import ChatModel, ChatRequest
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.interfaces.thoughts import strip_thoughts
from clvr_jax.rewards.judge_prompt import JudgePrompt, PromptedEditJudge, question
from clvr_jax.rewards.reward import Score

CATEGORIES = {"Instruction Following": "follow", "Feature Preservation": "keep", "Image Quality": "quality"}
"""Category of a point in replies -> name of the part of a score."""

_MAX_POINTS, _MAX_CHARACTERS, _MAX_CACHED = 20, 500, 4096

_POINTS = """You judge image edits. Write the points by which an edit of the image you see is to be judged: yes-or-no
questions about the edited image, about 10 of them:
1. 3 or 4 of the category "Instruction Following": is what the instruction asks for done?
2. 3 or 4 of the category "Feature Preservation": is everything else as in the image?
3. 2 or 3 of the category "Image Quality": is the result well made?

Answer with one JSON array: [{{"question": "...", "category": "..."}}, ...]

Instruction: {text}"""
_JUDGE = """Judge an edit of an image. Compare the two images at each point below, then give a final score.

Original image: <image>
Edited image: <image>
Edit instruction: {text}
Points: {points}

A point scores 1 if it is met, 0 if it is not or if you are not sure. A move or a change of degree must be large to be
met; give bounding boxes when you reason about positions. "Left" and "right" of a person are the person's own. A point
that contradicts the instruction is left out of the final score.

The final score is from 0 to 10, decimals allowed, and is not the mean of the points: 0 cannot be used, 5 can be used in
part, 8 can be used after small corrections. Deduct for a point that is not met by how hard it is to correct, and for
anything that changed without being asked for. If the images are nearly the same, the score is 0.

Reason first. Then end with one line in this form, with every point in the given order:
[{{"question": "...", "score": 0 or 1}}, ...], {{"average_score": X}} <score>X</score>"""


@dataclass(frozen=True)
class Point:
    """A point that an edit must meet. question: with the answer yes if it is met. category: a key of `CATEGORIES`."""

    question: str
    category: str


class EditRRM(PromptedEditJudge):
    """Computes R_I2I in [0, 1]: the final score / 10.

    Parts are the final score ("final") and the shares of points that are met ("follow", "keep", "quality"). The points
    of a source and an instruction are written once, so that a group of edits is judged by the same ones.

    Attributes:
      model: the model that judges.

    Args:
      model: a vision-language model, which is called from several threads at once.
      points_model: the model that writes the points; `model` if None.
      max_tokens: maximum number of tokens of a reply, its reasoning included.
    """

    def __init__(self, model: ChatModel, points_model: ChatModel | None = None, max_tokens: int = 4096):
        self.model, self._points_model, self._max_tokens = model, points_model or model, max_tokens
        self._points: dict[str, tuple[Point, ...]] = {}

    @override
    def judge_prompt(self, source: ImageLike, edited: ImageLike, instruction: str) -> JudgePrompt:
        array = pixels(source)
        key = hashlib.sha256(f"{array.shape} {instruction}".encode() + array.tobytes()).hexdigest()

        def judge(points: tuple[Point, ...]) -> JudgePrompt:
            request = self._judge_request(source, edited, instruction, points)
            return JudgePrompt(self.model, [request], lambda answers: read_judgment(answers[0], points))

        def read_and_judge(answers: Sequence[str]) -> JudgePrompt:
            if len(self._points) >= _MAX_CACHED:
                self._points.clear()
            # Two threads may ask at once; both judge by the points that came first.
            return judge(self._points.setdefault(key, read_points(answers[0])))

        if (known := self._points.get(key)) is not None:
            return judge(known)
        asked = question(_POINTS.format(text=instruction), (source,), self._max_tokens)
        return JudgePrompt(self._points_model, [asked], read_and_judge)

    def _judge_request(
        self, source: ImageLike, edited: ImageLike, instruction: str, points: Sequence[Point]
    ) -> ChatRequest:
        listed = json.dumps(
            [{"question": one.question, "category": one.category} for one in points], ensure_ascii=False
        )
        # The images are within the text, as the model was trained; braces of the points are no fields.
        before, between, after = _JUDGE.split("<image>")
        content = [
            {"type": "text", "text": before},
            {"type": "image"},
            {"type": "text", "text": between},
            {"type": "image"},
            {"type": "text", "text": after.format(text=instruction, points=listed)},
        ]
        return ChatRequest([{"role": "user", "content": content}], (source, edited), self._max_tokens)


def read_points(answer: str) -> tuple[Point, ...]:
    """Parses [{"question": ..., "category": ...}, ...] into points.

    Raises: AnswerError for another form, more than 20 points, or none that follow the instruction.
    """
    reply = _after_thoughts(answer)
    start = re.search(r"\[\s*\{", reply)
    if start is None:
        raise AnswerError(f"the points must be a JSON array of objects, got {' '.join(reply.split())[:80]!r}")
    try:
        found, _ = json.JSONDecoder().raw_decode(reply[start.start() :])
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"the points are no JSON array ({error})") from error
    if len(found) > _MAX_POINTS:
        raise AnswerError(f"{len(found)} points; give at most {_MAX_POINTS}")
    points = tuple(_point(number, one) for number, one in enumerate(found, 1))
    if not any(CATEGORIES[point.category] == "follow" for point in points):
        raise AnswerError('no point has the category "Instruction Following"')
    return points


def read_judgment(answer: str, points: Sequence[Point]) -> Score:
    """Parses a list with "score" 0 or 1 for every point, then <score>x</score> with x from 0 to 10, once.

    Raises: AnswerError, which says what is missing.
    """
    reply = _after_thoughts(answer)
    finals = re.findall(r"<score>\s*([^<]*?)\s*<[/\\]\s*score>", reply)
    if len(finals) != 1:
        raise AnswerError(f"the reply must have one <score>0 to 10</score>, got {len(finals)}")
    if not re.fullmatch(r"\d{1,2}(\.\d+)?", finals[0]) or float(finals[0]) > 10:
        raise AnswerError(f"<score> must be a number from 0 to 10, got {finals[0][:40]!r}")
    # Reasoning may have drafts of the list.
    start = max((found.start() for found in re.finditer(r"\[\s*\{", reply)), default=len(reply))
    given = re.findall(r"""["']score["']\s*:\s*["']?([^\s,"'}\]]*)""", reply[start:])
    if len(given) != len(points):
        raise AnswerError(f"{len(given)} scores for {len(points)} points")
    if wrong := [one for one in given if one not in ("0", "1", "0.0", "1.0")]:
        raise AnswerError(f"the score of a point must be 0 or 1, got {wrong[0][:40]!r}")
    final = float(finals[0])
    parts = {"final": final}
    for category, name in CATEGORIES.items():
        met = [float(one) for one, point in zip(given, points, strict=True) if point.category == category]
        if met:
            parts[name] = sum(met) / len(met)
    return Score(final / 10, parts)


def _point(number: int, given: object) -> Point:
    asked, category = (given.get("question"), given.get("category")) if isinstance(given, dict) else (None, None)
    if not isinstance(asked, str) or not asked.strip() or len(asked) > _MAX_CHARACTERS:
        raise AnswerError(f"point {number} must have a question of at most {_MAX_CHARACTERS} characters")
    if not isinstance(category, str) or category not in CATEGORIES:
        raise AnswerError(f"point {number}: category must be {', '.join(CATEGORIES)}, got {str(category)[:40]!r}")
    return Point(asked.strip(), category)


def _after_thoughts(answer: str) -> str:
    reply = strip_thoughts(answer)
    if reply is None:
        raise AnswerError("the reply ends within a thought; allow more tokens")
    return reply
