"""The rewards and proxy prompts of PPRL as a recipe's options describe them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ChatModel
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.providers.endpoint import Endpoint
from clvr_jax.providers.local import MeshChatModel
from clvr_jax.providers.ocr import RapidTextReader
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.rewards import (
    EditRRM,
    FirmEdit,
    FirmGen,
    LastTextReward,
    MeshReward,
    ProxyReward,
    Reward,
    TextReward,
    UnifiedReward,
    UnifiedRewardEdit,
)
from clvr_jax.rewards.judge_prompt import PromptedEditJudge, PromptedImageJudge
from clvr_jax.rewards.proxy_prompt_generator import ProxyPromptGenerator, vlm_proxy_prompt_generator

ImageProtocol = Literal["unified_reward", "firm"]
"""How a judge of images is asked, and how it replies."""
EditProtocol = Literal["unified_reward", "firm", "edit_rrm"]
"""How a judge of edits is asked, and how it replies."""

_IMAGE_JUDGES: Mapping[ImageProtocol, type[UnifiedReward | FirmGen]] = {
    "unified_reward": UnifiedReward,
    "firm": FirmGen,
}
_PUBLISHED: Mapping[ImageProtocol, str] = {
    "unified_reward": "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
    "firm": "VisionXLab/FIRM-Gen-8B",
}
_PUBLISHED_EDIT: Mapping[EditProtocol, str] = {
    "unified_reward": "CodeGoat24/UnifiedReward-Edit-qwen3vl-8b",
    "firm": "VisionXLab/FIRM-Edit-8B",
}


@dataclasses.dataclass(frozen=True)
class ImageRewardOptions:
    """Options of recipes whose images a vision-language model judges."""

    simple: bool = False
    """Train the ablation "simple RL", whose reward reads only the latest image and the last text."""
    judge: str = ""
    """Judge images with this Qwen3-VL, a directory or Hugging Face id, on the devices that train; give either this or
    --reward-url."""
    judge_protocol: ImageProtocol = "unified_reward"
    """Ask the judge of images as this reward model is asked, and read its replies: UnifiedReward, or FIRM-Gen."""
    reward_url: str = ""
    """Judge behind this OpenAI-compatible chat API, up to and including the version, such as http://localhost:8000/v1;
    give either this or --judge."""
    reward_model: str = ""
    """With --reward-url: the server's name for the model that judges images; the name that --judge-protocol was
    published with if it is empty."""
    text_weight: float = 0.0
    """With --reward-url: let the letters that OCR reads make up this share of the reward of images whose prompt quotes
    a text (pip install 'clvr-jax[ocr]')."""
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
    """Options of recipes whose images and edits vision-language models judge."""

    edit_judge: str = ""
    """Judge edits with this Qwen3-VL, a directory or Hugging Face id, on the devices that train; it goes with
    --judge."""
    edit_judge_protocol: EditProtocol = "unified_reward"
    """Ask the judge of edits as this reward model is asked, and read its replies: UnifiedReward-Edit, FIRM-Edit, or
    Edit-RRM."""
    edit_reward_model: str = ""
    """With --reward-url: the server's name for the model that judges edits; the name that --edit-judge-protocol was
    published with if it is empty. Edit-RRM has no such name."""
    points_model: str = ""
    """With --edit-judge-protocol edit_rrm: let this model write the points that the judge checks. It is where the judge
    is: a directory or Hugging Face id, or the server's name. The judge of edits writes them if it is empty."""


def make_reward(recipe: str, options: ImageRewardOptions, dtype: str, batch_size: int) -> Reward:
    """Returns a reward of judges on the devices that train (those of the active layout), or behind an endpoint.

    Args:
      recipe: its name, for errors.
      options: which judges, and where. `ImageRewardOptions` name no judge of edits, for models that cannot edit.
      dtype: of a judge on the devices that train.
      batch_size: number of questions that it answers together.
    Raises: ClvrError if the options name no judge or several, or lack the judge of edits.
    """
    if bool(options.judge) == bool(options.reward_url):
        raise ClvrError(
            f"{recipe}: the judge is missing; give either --judge, a directory or Hugging Face id of a reward model "
            "for the devices that train, or --reward-url, where it is served, e.g. http://localhost:8000/v1"
        )
    if isinstance(options, RewardOptions) and options.points_model and options.edit_judge_protocol != "edit_rrm":
        raise ClvrError(f"{recipe}: --points-model goes with --edit-judge-protocol edit_rrm")
    if not 0 <= options.text_weight <= 1:
        raise ClvrError(f"{recipe}: --text-weight must be from 0 to 1, got {options.text_weight}")
    if options.judge:
        if options.text_weight:
            raise ClvrError(f"{recipe}: --text-weight goes with --reward-url; on the devices, every process would read")
        return _mesh_reward(recipe, options, dtype, batch_size)
    reward = _served_reward(recipe, options)
    return TextReward(reward, RapidTextReader(), options.text_weight) if options.text_weight else reward


def _served_reward(recipe: str, options: ImageRewardOptions) -> Reward:
    def serve(model: str) -> OpenAIChatModel:
        return OpenAIChatModel(_endpoint(options, model, options.reward_url, options.reward_key))

    image_model = options.reward_model or _PUBLISHED[options.judge_protocol]
    image_judge = _image_judge(options, serve(image_model))
    if options.simple:
        return LastTextReward(image_judge)
    if not isinstance(options, RewardOptions):
        return ProxyReward(image_judge, UnifiedRewardEdit(serve(image_model)))
    edit_model = options.edit_reward_model or _PUBLISHED_EDIT.get(options.edit_judge_protocol, "")
    if not edit_model:
        raise ClvrError(f"{recipe}: --edit-judge-protocol {options.edit_judge_protocol} needs --edit-reward-model")
    return ProxyReward(image_judge, _edit_judge(options, serve(edit_model), serve))


def _mesh_reward(recipe: str, options: ImageRewardOptions, dtype: str, batch_size: int) -> Reward:
    loaded: dict[str, MeshChatModel] = {}

    def load(model: str) -> MeshChatModel:
        if model not in loaded:
            loaded[model] = MeshChatModel(Qwen3VLPipeline.from_pretrained(model, dtype), model, batch_size)
        return loaded[model]

    if options.simple:
        return MeshReward(_image_judge(options, load(options.judge)))
    if not isinstance(options, RewardOptions):
        return MeshReward(_image_judge(options, load(options.judge)), UnifiedRewardEdit(load(options.judge)))
    if not options.edit_judge:
        raise ClvrError(
            f"{recipe}: --judge judges images; give --edit-judge for a judge of edits, or --simple to leave edits out"
        )
    image_judge = _image_judge(options, load(options.judge))
    return MeshReward(image_judge, _edit_judge(options, load(options.edit_judge), load))


def _image_judge(options: ImageRewardOptions, model: ChatModel) -> PromptedImageJudge:
    return _IMAGE_JUDGES[options.judge_protocol](model)


def _edit_judge(options: RewardOptions, model: ChatModel, find: Callable[[str], ChatModel]) -> PromptedEditJudge:
    """Returns the judge of edits. find: name -> the model, loaded or served."""
    if options.edit_judge_protocol == "edit_rrm":
        return EditRRM(model, find(options.points_model) if options.points_model else None)
    return FirmEdit(model) if options.edit_judge_protocol == "firm" else UnifiedRewardEdit(model)


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
