"""The rewards and proxy prompts of PPRL as a recipe's options describe them."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.providers.endpoint import Endpoint
from clvr_jax.providers.local import MeshChatModel
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.rewards import LastTextReward, MeshReward, ProxyReward, Reward, UnifiedReward, UnifiedRewardEdit
from clvr_jax.rewards.proxy_prompt_generator import ProxyPromptGenerator, vlm_proxy_prompt_generator


@dataclasses.dataclass(frozen=True)
class ImageRewardOptions:
    """Options of recipes whose images UnifiedReward judges."""

    simple: bool = False
    """Train the ablation "simple RL", whose reward reads only the latest image and the last text."""
    judge: str = ""
    """Judge images with this UnifiedReward, a directory or Hugging Face id, on the devices that train; give either this
    or --reward-url."""
    reward_url: str = ""
    """Judge behind this OpenAI-compatible chat API, up to and including the version, such as http://localhost:8000/v1;
    give either this or --judge."""
    reward_model: str = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
    """With --reward-url: the server's name for the model that judges images."""
    reward_key: str = ""
    """Environment variable with the key of --reward-url; empty for a server without keys."""
    proxy_prompt_url: str = ""
    """Let a model behind this OpenAI-compatible chat API write the proxy prompts during training; the dataset's own are
    used if it is empty."""
    proxy_prompt_model: str = ""
    """The server's name for the model of --proxy-prompt-url."""
    proxy_prompt_key: str = ""
    """Environment variable with the key of --proxy-prompt-url; empty for a server without keys."""
    endpoint_max_seconds: float = 1200.0
    """Wait this many seconds at most for a whole reply of --reward-url or --proxy-prompt-url, however slowly it comes.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {
        "teacher_url": "proxy_prompt_url",
        "teacher_model": "proxy_prompt_model",
        "teacher_key": "proxy_prompt_key",
    }
    """Names in `recipe.json` of runs before these fields were renamed -> today's, for `config_from_json`."""


@dataclasses.dataclass(frozen=True)
class RewardOptions(ImageRewardOptions):
    """Options of recipes whose images and edits UnifiedReward and UnifiedReward-Edit judge."""

    edit_judge: str = ""
    """Judge edits with this UnifiedReward-Edit, a directory or Hugging Face id, on the devices that train; it goes with
    --judge."""
    edit_reward_model: str = "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b"
    """With --reward-url: the server's name for the model that judges edits."""


def make_reward(recipe: str, options: ImageRewardOptions, dtype: str, batch_size: int) -> Reward:
    """Returns UnifiedReward on the devices that train (those of the active layout), or behind an endpoint.

    Args:
      recipe: its name, for errors.
      options: which judges, and where. `ImageRewardOptions` name no judge of edits, for models that cannot edit.
      dtype: of a judge on the devices that train.
      batch_size: number of questions that it answers together.
    Raises: ClvrError if the options name no judge or several, or lack the judge of edits.
    """
    if bool(options.judge) == bool(options.reward_url):
        raise ClvrError(
            f"{recipe}: the judge is missing; give either --judge, a directory or Hugging Face id of UnifiedReward "
            "for the devices that train, or --reward-url, where it is served, e.g. http://localhost:8000/v1"
        )
    return _mesh_reward(recipe, options, dtype, batch_size) if options.judge else _served_reward(options)


def _served_reward(options: ImageRewardOptions) -> Reward:
    def serve(model: str) -> OpenAIChatModel:
        return OpenAIChatModel(_endpoint(options, model, options.reward_url, options.reward_key))

    image_reward = UnifiedReward(serve(options.reward_model))
    if options.simple:
        return LastTextReward(image_reward)
    edit_model = options.edit_reward_model if isinstance(options, RewardOptions) else options.reward_model
    return ProxyReward(image_reward, UnifiedRewardEdit(serve(edit_model)))


def _mesh_reward(recipe: str, options: ImageRewardOptions, dtype: str, batch_size: int) -> Reward:
    def load(model: str) -> MeshChatModel:
        return MeshChatModel(Qwen3VLPipeline.from_pretrained(model, dtype), model, batch_size)

    if options.simple:
        return MeshReward(UnifiedReward(load(options.judge)))
    edit_model = options.edit_judge if isinstance(options, RewardOptions) else options.judge
    if not edit_model:
        raise ClvrError(
            f"{recipe}: --judge judges images; give --edit-judge for a judge of edits, or --simple to leave edits out"
        )
    judge = load(options.judge)
    return MeshReward(
        UnifiedReward(judge), UnifiedRewardEdit(judge if edit_model == options.judge else load(edit_model))
    )


def check_proxy_prompt_options(recipe: str, options: ImageRewardOptions) -> None:
    """Raises ClvrError if only one of the address and the name of the proxy-prompt generator is given."""
    if bool(options.proxy_prompt_url) != bool(options.proxy_prompt_model):
        raise ClvrError(
            f"{recipe}: --proxy-prompt-url and --proxy-prompt-model go together: where it is served, and its name"
        )


def make_proxy_prompt_generator(options: ImageRewardOptions, steps: ProxySteps) -> ProxyPromptGenerator | None:
    """Returns the generator that writes proxy prompts during training; None if the dataset's own are used."""
    if not options.proxy_prompt_url:
        return None
    endpoint = _endpoint(options, options.proxy_prompt_model, options.proxy_prompt_url, options.proxy_prompt_key)
    return vlm_proxy_prompt_generator(OpenAIChatModel(endpoint), steps)


def _endpoint(options: ImageRewardOptions, model: str, url: str, key_variable: str) -> Endpoint:
    return Endpoint(model, url, key_variable or None, max_seconds=options.endpoint_max_seconds)
