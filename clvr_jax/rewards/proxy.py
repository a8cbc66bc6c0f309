"""Proxy Prompt RL's reward: the long history of a step is judged through the short texts that stand for it.

    R(c_t, a) = R_T2I(a, p_T2I)                                                  t = 0
              = 1/2 R_T2I(a, p_T2I) + 1/2 mean over I_ref of R_I2I(source, a, p_I2I)      t > 0

Source: arXiv 2605.14876, Proxy Prompt RL; "simple RL" is its ablation.
"""

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from clvr_jax.errors import UsageError
from clvr_jax.interfaces import ProviderError
from clvr_jax.rewards.reward import Case, EditJudge, Marks, PictureJudge, Reward, Scores


class ProxyReward(Reward):
    """R_T2I and R_I2I of two judges, half and half; logged as "t2i" and "i2i", with the parts of both.

    Args:
      picture, edit: the judges.
      in_flight: calls of judges at once, over all batches that are scored at the same time.
    """

    def __init__(self, picture: PictureJudge, edit: EditJudge, in_flight: int = 16):
        self._picture, self._edit = picture, edit
        self._calls = _pool(in_flight)

    def scores(self, cases: Sequence[Case]) -> Scores:
        """See `Reward`."""
        return _scores([self._asked(case) for case in cases])

    def _asked(self, case: Case) -> list[Future[Marks]]:
        """R_T2I, then R_I2I for each source: an edit judge reads one at a time."""
        text, instruction = case.proxies.p_t2i, case.proxies.p_i2i
        edits = [self._calls.submit(self._edit.edit, source, case.picture, instruction) for source in case.references]
        return [self._calls.submit(self._picture.picture, case.picture, text), *edits]


class LastTextReward(Reward):
    """ "Simple RL": R_T2I of the latest picture and the last text alone, without proxies; logged as "t2i".

    Args: see `ProxyReward`.
    """

    def __init__(self, picture: PictureJudge, in_flight: int = 16):
        self._picture = picture
        self._calls = _pool(in_flight)

    def scores(self, cases: Sequence[Case]) -> Scores:
        """See `Reward`."""
        return _scores([[self._calls.submit(self._picture.picture, case.picture, case.last_text)] for case in cases])


def _scores(waiting: Sequence[Sequence[Future[Marks]]]) -> Scores:
    """Of each case the answers that it waits for. Where one cannot be had, none of the others is asked any more."""
    try:
        marks = [[future.result() for future in futures] for futures in waiting]
        check_replies([one for of_case in marks for one in of_case], "the judge")
        return Scores.of([combined(*of_case) for of_case in marks])
    finally:
        for future in (one for futures in waiting for one in futures):
            future.cancel()


def combined(text: Marks, *edits: Marks) -> Marks:
    """R of one picture from R_T2I and R_I2I of each of its sources, with the parts of all."""
    parts = {"t2i": text.value, **{f"t2i/{name}": value for name, value in text.parts.items()}}
    problem = next((one.problem for one in (text, *edits) if one.problem is not None), None)
    if not edits:
        return Marks(text.value, parts, problem)
    names = Counter(name for edit in edits for name in edit.parts)
    means = {f"i2i/{name}": _mean([edit.parts.get(name, math.nan) for edit in edits]) for name in names}
    i2i = _mean([edit.value for edit in edits])
    return Marks(0.5 * text.value + 0.5 * i2i, {**parts, "i2i": i2i, **means}, problem)


def check_replies(marks: Sequence[Marks], name: str) -> None:
    """Raises ProviderError if not one of the marks of a batch got a reply: that is no property of the images."""
    if marks and all(one.problem == "no_reply" for one in marks):
        raise ProviderError(
            f"reward: {name} gave no reply to any of {len(marks)} questions (empty or cut), so nothing is "
            "scored; allow more tokens or look after the server, then resume",
            "down",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pool(in_flight: int) -> ThreadPoolExecutor:
    if in_flight < 1:
        raise UsageError(f"reward: in_flight must be at least 1, got {in_flight}")
    return ThreadPoolExecutor(in_flight, thread_name_prefix="reward")
