"""Proxy Prompt RL's reward by reward models of our own, spread over the devices that train.

The same sums as those of `proxy`; what differs is who asks, and when: all processes, all questions of a batch together.
"""

from collections.abc import Sequence

from clvr_jax.interfaces import ChatModel, ChatRequest
from clvr_jax.rewards.proxy import check_replies, combined
from clvr_jax.rewards.reward import Case, Marks, Reward, Scores
from clvr_jax.rewards.unified_reward import JudgePrompt, UnifiedReward, UnifiedRewardEdit, read_marks


class MeshReward(Reward):
    """R_T2I and R_I2I of two judges whose models are on the mesh; logged as `ProxyReward` does.

    Args:
      picture: judge of pictures by their text.
      edit: judge of edits; None for "simple RL", whose pictures are judged by the last text alone.
    """

    runs_on_devices = True

    def __init__(self, picture: UnifiedReward, edit: UnifiedRewardEdit | None = None):
        self._picture, self._edit = picture, edit

    def scores(self, cases: Sequence[Case]) -> Scores:
        """See `Reward`."""
        pictures = [self._picture.inquiry(case.picture, self._text(case)) for case in cases]
        marks_t2i = iter(_marked(self._picture.model, pictures))
        if self._edit is None:
            return Scores.of([combined(one) for one in marks_t2i])
        edit = self._edit
        edits = [
            [edit.inquiry(source, case.picture, case.proxies.p_i2i) for source in case.references] for case in cases
        ]
        marks_i2i = iter(_marked(edit.model, [one for of_case in edits for one in of_case]))
        return Scores.of([combined(next(marks_t2i), *(next(marks_i2i) for _ in of_case)) for of_case in edits])

    def _text(self, case: Case) -> str:
        return case.last_text if self._edit is None else case.proxies.p_t2i


def _marked(model: ChatModel, inquiries: Sequence[JudgePrompt]) -> list[Marks]:
    questions: list[ChatRequest] = [question for inquiry in inquiries for question in inquiry.questions]
    answers = iter(model.chat_all(questions))
    marks = [read_marks(inquiry, [next(answers).text for _ in inquiry.questions]) for inquiry in inquiries]
    check_replies(marks, model.name)
    return marks
