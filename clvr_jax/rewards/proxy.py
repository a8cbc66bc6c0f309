"""The reward of Proxy Prompt RL: an image is judged by short proxy prompts in place of the long history of its step.

    R(c_t, a) = R_T2I(a, p_T2I)                                                  t = 0
              = 1/2 R_T2I(a, p_T2I) + 1/2 mean over I_ref of R_I2I(source, a, p_I2I)      t > 0

Source: arXiv 2605.14876, Proxy Prompt RL; "simple RL" is its ablation.
"""

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from typing_extensions import override

from clvr_jax.errors import UsageError
from clvr_jax.interfaces import ProviderError
from clvr_jax.rewards.reward import EditJudge, ImageJudge, Reward, RewardInput, Score, Scores

_MANY = 8
"""Number of unreadable replies that are the fault of the judge's form; fewer may be bad luck."""


class ProxyReward(Reward):
    """Combines R_T2I and R_I2I of two judges with equal weights; parts "t2i" and "i2i", and the parts of both judges.

    Args:
      image: judge of images by their text.
      edit: judge of edits.
      in_flight: maximum number of concurrent calls, over all batches that are scored at the same time; at least 1.
    """

    def __init__(self, image: ImageJudge, edit: EditJudge, in_flight: int = 16):
        self._image, self._edit = image, edit
        self._calls = _pool(in_flight)

    @override
    def scores(self, inputs: Sequence[RewardInput]) -> Scores:
        return _scores([self._submit(item) for item in inputs])

    def _submit(self, item: RewardInput) -> list[Future[Score]]:
        """Submits the calls for R_T2I, then for R_I2I of each source: an edit judge takes one source per call."""
        text, instruction = item.proxies.p_t2i, item.proxies.p_i2i
        edits = [
            self._calls.submit(self._edit.score_edit, source, item.image, instruction) for source in item.references
        ]
        return [self._calls.submit(self._image.score_image, item.image, text), *edits]


class LastTextReward(Reward):
    """The reward of "simple RL": R_T2I of the latest image for the last text alone, without proxies; part "t2i".

    Args:
      image: judge of images by their text.
      in_flight: see `ProxyReward`.
    """

    def __init__(self, image: ImageJudge, in_flight: int = 16):
        self._image = image
        self._calls = _pool(in_flight)

    @override
    def scores(self, inputs: Sequence[RewardInput]) -> Scores:
        return _scores([[self._calls.submit(self._image.score_image, item.image, item.last_text)] for item in inputs])


def _scores(pending: Sequence[Sequence[Future[Score]]]) -> Scores:
    """Waits for the scores of each input and combines them. If a call fails, all calls that wait are canceled."""
    try:
        scores = [[future.result() for future in futures] for futures in pending]
        check_replies([one for of_item in scores for one in of_item], "the judge")
        check_form([text for text, *_ in scores], "the judge of images")
        check_form([edit for _, *edits in scores for edit in edits], "the judge of edits")
        return Scores.stack([combine_scores(*of_item) for of_item in scores])
    finally:
        for future in (one for futures in pending for one in futures):
            future.cancel()


def combine_scores(text: Score, *edits: Score) -> Score:
    """Combines the score R_T2I of an image with the scores R_I2I for each of its sources.

    Args:
      text: R_T2I.
      edits: R_I2I for each source; none for an image generated from text alone.
    Returns: the mean of R_T2I and the mean R_I2I, or R_T2I alone; the parts of all; the first problem, if any.
    """
    parts = {"t2i": text.value, **{f"t2i/{name}": value for name, value in text.parts.items()}}
    problem = next((one.problem for one in (text, *edits) if one.problem is not None), None)
    if not edits:
        return Score(text.value, parts, problem)
    names = Counter(name for edit in edits for name in edit.parts)
    means = {f"i2i/{name}": _mean([edit.parts.get(name, math.nan) for edit in edits]) for name in names}
    i2i = _mean([edit.value for edit in edits])
    return Score(0.5 * text.value + 0.5 * i2i, {**parts, "i2i": i2i, **means}, problem)


def check_replies(scores: Sequence[Score], name: str) -> None:
    """Raises ProviderError if no score of a batch has a reply, which is not a property of the images.

    Args:
      scores: the scores of a batch.
      name: the name of the judge, for the message.
    """
    if scores and all(one.problem == "no_reply" for one in scores):
        raise ProviderError(
            f"reward: {name} gave no reply to any of {len(scores)} questions (empty or cut), so nothing is "
            "scored; allow more tokens or check the server, then resume",
            "down",
        )


def check_form(scores: Sequence[Score], name: str) -> None:
    """Raises ProviderError if 8 or more replies of one judge are all unreadable, which is not a property of the images.

    Args:
      scores: the scores of a batch by one judge.
      name: the name of the judge, for the message.
    """
    if len(scores) >= _MANY and all(one.problem == "unreadable" for one in scores):
        raise ProviderError(
            f"reward: none of the {len(scores)} replies of {name} can be parsed (the first: {scores[0].reason}); "
            "give the protocol that this model was trained for (--judge-protocol, --edit-judge-protocol)",
            "rejected",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pool(in_flight: int) -> ThreadPoolExecutor:
    if in_flight < 1:
        raise UsageError(f"reward: in_flight must be at least 1, got {in_flight}")
    return ThreadPoolExecutor(in_flight, thread_name_prefix="reward")
