"""Verified trajectories of your own prompts, with vision-language models and an image tool of your choice.

Every role is a model behind an OpenAI-compatible endpoint or one of ours on this machine; docs/how-to/data-engine.md
has the options for Gemini with Seedream as in the paper, for vLLM, and for our own Qwen3-VL and FLUX.2.

    clvr synth configs/prompted_synth.py --prompts prompts.txt --out runs/synth

A wrong image stays in its trajectory as context and is corrected; the image generator never learns it, the controller
learns the verdict on it. `--synth.no-keep-mistakes` discards the trajectory instead.

The two judges should be different models: they must agree without knowing of each other.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from clvr_jax.data.engine.intake import read_prompts
from clvr_jax.data.engine.metering import UsageTracker
from clvr_jax.data.engine.recipes import SynthConfig, WorkerContext
from clvr_jax.data.engine.roles.base import PromptItem, Roles
from clvr_jax.data.engine.roles.prompted import make_prompted_roles
from clvr_jax.errors import UsageError
from clvr_jax.interfaces import ChatModel, ImageModel
from clvr_jax.providers.endpoint import Endpoint

_GEMINI = "https://generativelanguage.googleapis.com/v1beta/openai"
_ARK = "https://ark.cn-beijing.volces.com/api/v3"


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the prompts, and of the model that plays each role."""

    synth: SynthConfig = SynthConfig()
    """Configuration of the data engine."""
    prompts: Path = Path("prompts.txt")
    """Read the prompts from this file: one in each line, or JSON lines with "prompt" and, optionally, "id" and
    "metadata"."""
    evaluation: tuple[Path, ...] = ()
    """Leave out the prompts of these files and near duplicates of them; none are left out by default."""
    director: Endpoint = Endpoint("gemini-2.5-pro", _GEMINI, "GEMINI_API_KEY", max_in_flight=64)
    """Endpoint of the model that plans, acts, and describes at the end what was done."""
    verifier: Endpoint = Endpoint("gemini-2.5-pro", _GEMINI, "GEMINI_API_KEY", max_in_flight=64)
    """Endpoint of the model that makes the checklists and answers them; it is also the first judge."""
    second_judge: Endpoint = Endpoint("doubao-seed-1-8", _ARK, "ARK_API_KEY", max_in_flight=64)
    """Endpoint of the second judge, which should be a different model."""
    images: Endpoint = Endpoint("doubao-seedream-4-0", _ARK, "ARK_API_KEY", max_in_flight=64, timeout=300)
    """Endpoint of the image tool, which generates and edits."""
    thought_tokens: int = 4096
    """Allow each reply this many tokens beyond its own limit, for roles that think first; servers count thoughts."""
    image_size: tuple[int, ...] = (1024, 1024)
    """Ask the image endpoint for images of this height and width; the server chooses if it is empty."""
    image_references: Literal["edits", "generations"] = "generations"
    """Send images to be edited as uploads to /images/edits (edits), or inside the request to /images/generations
    (generations), as Seedream expects."""
    image_format: Literal["", "b64_json", "url"] = ""
    """Ask the image endpoint to return images in this form; the request does not name one if it is empty. Servers that
    return a path on their own disk (Xinference, SGLang) need b64_json."""
    image_sends_seed: bool = False
    """Send a seed with each request for an image, which not every server accepts."""
    local_vlm: str = ""
    """Play all roles with this Qwen3-VL on this machine, a directory or Hugging Face id, in place of the endpoints; the
    endpoints are used if it is empty."""
    local_images: str = ""
    """Generate images with this FLUX.2 on this machine, a directory or Hugging Face id, in place of the endpoint; the
    endpoint is used if it is empty."""

    def __post_init__(self) -> None:
        if len(self.image_size) not in (0, 2):
            raise UsageError(f"image_size: height and width, or nothing; got {self.image_size}")


CONFIG = Config()


def prompts(config: Config) -> Iterator[PromptItem]:
    """Returns the prompts of the file."""
    return read_prompts(config.prompts)


def evaluation_prompts(config: Config) -> Iterator[str]:
    """Returns the evaluation prompts of all files."""
    return (item.prompt for path in config.evaluation for item in read_prompts(path))


@dataclasses.dataclass(frozen=True)
class _Models:
    director: ChatModel
    verifier: ChatModel
    second_judge: ChatModel
    image_model: ImageModel

    def roles(self, item: PromptItem, tracker: UsageTracker) -> Roles:
        verifier = tracker.model("verifier", self.verifier)
        judges = tracker.model("first judge", self.verifier), tracker.model("second judge", self.second_judge)
        return make_prompted_roles(tracker.model("director", self.director), verifier, judges)


def worker_context(config: Config) -> WorkerContext:
    """Connections to the endpoints, and models that are loaded here."""
    image_model = _image_tool(config)
    if config.local_vlm:
        from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
        from clvr_jax.providers.local import LocalChatModel

        local = LocalChatModel(Qwen3VLPipeline.from_pretrained(config.local_vlm), config.local_vlm)
        return _Models(local, local, local, image_model)
    from clvr_jax.providers.openai_chat import OpenAIChatModel

    director, verifier, judge = (
        OpenAIChatModel(endpoint, thought_tokens=config.thought_tokens)
        for endpoint in (config.director, config.verifier, config.second_judge)
    )
    return _Models(director, verifier, judge, image_model)


def _image_tool(config: Config) -> ImageModel:
    if config.local_images:
        from clvr_jax.pipelines.flux2 import Flux2Pipeline
        from clvr_jax.providers.local import LocalImageModel

        return LocalImageModel(Flux2Pipeline.from_pretrained(config.local_images), config.local_images)
    from clvr_jax.providers.openai_images import OpenAIImageModel

    size = (config.image_size[0], config.image_size[1]) if config.image_size else None
    return OpenAIImageModel(
        config.images,
        size=size,
        references=config.image_references,
        response_format=config.image_format or None,
        sends_seed=config.image_sends_seed,
    )
