"""The reward of Proxy Prompt RL with judges that run on the training devices.

It computes the same values as `proxy`. All processes call the judges, with all questions of a batch in one call;
questions that follow from replies are another call.
"""

from collections.abc import Sequence

from typing_extensions import override

from clvr_jax.interfaces import ChatModel, ChatRequest
from clvr_jax.rewards.judge_prompt import JudgePrompt, PromptedEditJudge, PromptedImageJudge, read_replies
from clvr_jax.rewards.proxy import check_form, check_replies, combine_scores
from clvr_jax.rewards.reward import Reward, RewardInput, Score, Scores


class MeshReward(Reward):
    """Combines R_T2I and R_I2I of two judges whose models are on the mesh; the parts are those of `ProxyReward`.

    Args:
      image: judge of images by their text.
      edit: judge of edits; None for "simple RL", where images are judged by the last text alone.
    """

    runs_on_devices = True

    def __init__(self, image: PromptedImageJudge, edit: PromptedEditJudge | None = None):
        self._image, self._edit = image, edit

    @override
    def scores(self, inputs: Sequence[RewardInput]) -> Scores:
        prompts = [self._image.judge_prompt(item.image, self._text(item)) for item in inputs]
        scores_t2i = iter(_score_all(prompts))
        if self._edit is None:
            return Scores.stack([combine_scores(one) for one in scores_t2i])
        edit = self._edit
        edits = [
            [edit.judge_prompt(source, item.image, item.proxies.p_i2i) for source in item.references] for item in inputs
        ]
        scores_i2i = iter(_score_all([one for of_item in edits for one in of_item]))
        return Scores.stack(
            [combine_scores(next(scores_t2i), *(next(scores_i2i) for _ in of_item)) for of_item in edits]
        )

    def _text(self, item: RewardInput) -> str:
        return item.last_text if self._edit is None else item.proxies.p_t2i


def _score_all(prompts: Sequence[JudgePrompt]) -> list[Score]:
    """Returns one score for each prompt; each model gets all questions that are due at once. Raises: see
    `check_replies` and `check_form`."""
    found: list[Score | JudgePrompt] = list(prompts)
    while due := [(index, one) for index, one in enumerate(found) if isinstance(one, JudgePrompt)]:
        # Models in the order of their first prompt, which is the same in all processes.
        models = {id(prompt.model): prompt.model for _, prompt in due}
        for model in models.values():
            asked = [(index, prompt) for index, prompt in due if prompt.model is model]
            answers = iter(_replies(model, [request for _, prompt in asked for request in prompt.questions]))
            for index, prompt in asked:
                found[index] = read_replies(prompt, [next(answers) for _ in prompt.questions])
    scores = [one for one in found if isinstance(one, Score)]
    name = ", ".join(dict.fromkeys(prompt.model.name for prompt in prompts))
    check_replies(scores, name)
    check_form(scores, name)
    return scores


def _replies(model: ChatModel, questions: Sequence[ChatRequest]) -> list[str]:
    return [response.text for response in model.chat_all(questions)]
