"""The reward of Proxy Prompt RL with judges that run on the training devices.

It computes the same values as `proxy`. All processes call the judges, with all questions of a batch in one call.
"""

from collections.abc import Sequence

from typing_extensions import override

from clvr_jax.interfaces import ChatModel, ChatRequest
from clvr_jax.rewards.proxy import check_replies, combine_scores
from clvr_jax.rewards.reward import Reward, RewardInput, Score, Scores
from clvr_jax.rewards.unified_reward import JudgePrompt, UnifiedReward, UnifiedRewardEdit, read_score


class MeshReward(Reward):
    """Combines R_T2I and R_I2I of two judges whose models are on the mesh; the parts are those of `ProxyReward`.

    Args:
      image: judge of images by their text.
      edit: judge of edits; None for "simple RL", where images are judged by the last text alone.
    """

    runs_on_devices = True

    def __init__(self, image: UnifiedReward, edit: UnifiedRewardEdit | None = None):
        self._image, self._edit = image, edit

    @override
    def scores(self, inputs: Sequence[RewardInput]) -> Scores:
        prompts = [self._image.judge_prompt(item.image, self._text(item)) for item in inputs]
        scores_t2i = iter(_score_all(self._image.model, prompts))
        if self._edit is None:
            return Scores.stack([combine_scores(one) for one in scores_t2i])
        edit = self._edit
        edits = [
            [edit.judge_prompt(source, item.image, item.proxies.p_i2i) for source in item.references] for item in inputs
        ]
        scores_i2i = iter(_score_all(edit.model, [one for of_item in edits for one in of_item]))
        return Scores.stack(
            [combine_scores(next(scores_t2i), *(next(scores_i2i) for _ in of_item)) for of_item in edits]
        )

    def _text(self, item: RewardInput) -> str:
        return item.last_text if self._edit is None else item.proxies.p_t2i


def _score_all(model: ChatModel, prompts: Sequence[JudgePrompt]) -> list[Score]:
    """Returns one score for each prompt, from one batch of all their questions. Raises: see `check_replies`."""
    questions: list[ChatRequest] = [question for prompt in prompts for question in prompt.questions]
    answers = iter(model.chat_all(questions))
    scores = [read_score(prompt, [next(answers).text for _ in prompt.questions]) for prompt in prompts]
    check_replies(scores, model.name)
    return scores
