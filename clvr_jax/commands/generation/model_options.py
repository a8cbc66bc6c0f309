"""Options for the models of a command: loading, images, and the controller of the loop."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import tyro

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Count
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from clvr_jax.models.common.quantization import Quantization
    from clvr_jax.pipelines.loading import LoadArguments, Quantize
    from clvr_jax.reasoning.conversation.protocols import Controller
    from clvr_jax.reasoning.verification.verification import Verifier
    from clvr_jax.sharding import MeshConfig

Url = Annotated[str | None, tyro.conf.arg(metavar="URL")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]

_MAX_SIDE = 2**15


class RoleArguments(TypedDict, total=False):
    """Arguments of `ClosedLoopPipeline.from_pretrained` that name the models of the loop."""

    controller: "str | Controller"
    verifier: "str | Verifier | None"
    max_reply_tokens: int
    prefix_cache_gib: float


@dataclass(frozen=True)
class MeshOptions:
    """Options for the mesh of devices that all models are placed on. Without any of them one device is used, or all
    devices if the models do not fit one, and with `clvr launch` all devices of all processes, which shard the
    parameters."""

    data: Count = None
    """Shard a batch over this many copies of the parameters; 1 if not given, and -1 takes the devices that are left."""
    fsdp: Count = None
    """Shard the parameters, and a batch, over this many devices; the devices that are left if not given."""
    sequence: Count = None
    """Shard the tokens over this many devices, and the heads inside attention; 1 if not given."""
    tensor: Count = None
    """Shard the heads and the hidden axis of every MLP over this many devices; 1 if not given. The product of this and
    the sequence axis must divide the attention heads of every model."""
    devices: Count = None
    """Use only the first so many devices; all devices are used if not given."""

    def config(self) -> "MeshConfig | None":
        """Returns the mesh; None for one device. Raises: UsageError for invalid sizes."""
        from clvr_jax.processes import is_distributed

        sizes = {name: value for name, value in vars(self).items() if value is not None}
        if not sizes and not is_distributed():
            return None
        from clvr_jax.sharding import MeshConfig

        return MeshConfig(**sizes)


@dataclass(frozen=True)
class LoadOptions:
    """Options for how models are loaded."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Load all models in this dtype and compute in it. If not given, each checkpoint's own on an accelerator, and
    float32 on a CPU."""
    lora: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:WEIGHT] ...")] = ()
    """Add these LoRAs to the transformer (or UNet), each with its weight, 1 if not given: files, directories or Hugging
    Face ids in the format of diffusers, PEFT, kohya or ai-toolkit."""
    ignore_text_encoder: bool = False
    """Leave out the tensors of a LoRA that adapt a text encoder, which are an error otherwise."""
    quantize: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[MODEL:]int8 ...")] = ()
    """Store weights as 8-bit integers, in half the memory of bfloat16: int8 for all large models of FLUX.2 and
    Qwen3-VL, or, for some of them, transformer:int8, text_encoder:int8, controller:int8 (with the verifier). If not
    given, weights are not quantized."""
    offload: Literal["components"] | None = None
    """components: hold transformer, text encoder and controller in host memory, and copy each to the devices while it
    computes, for devices that cannot hold all of them. If not given, all stay on the devices."""
    reference_cache: Literal["none", "image", "loop"] | None = None
    """Attend to references in this way, with FLUX.2 models. none: as tokens of every step; image: to their keys and
    values, which are computed once for an image; loop: each reference attends to those before it, and its keys and
    values are kept for the next images of a loop. If not given, as the model was trained; another choice is an
    approximation."""
    reference_cache_dtype: Literal["int8"] | None = None
    """int8: store cached keys and values of references as 8-bit integers, in about half the memory of bfloat16, with
    --reference-cache image or loop. If not given, they have the dtype of the computation."""
    reference_latents: Literal["encoded", "kept"] | None = None
    """Give generated images of a loop these latents when they become references, with FLUX.2 models. encoded: those of
    the encoded image, as for your own images; kept: those that the image was decoded from, without the error of
    decoding, rounding to 8 bits and encoding. If not given, as the directory of the model says, usually encoded."""
    mesh: MeshOptions = field(default_factory=MeshOptions)

    def __post_init__(self) -> None:
        self.loras()
        parse_quantize(self.quantize)
        if self.ignore_text_encoder and not self.lora:
            raise UsageError("--ignore-text-encoder has no effect without --lora; leave it out")

    def loras(self) -> tuple[tuple[str, float], ...]:
        """Returns each LoRA with its weight."""
        return tuple(parse_lora(word) for word in self.lora)

    def arguments(self) -> "LoadArguments":
        """Returns the arguments of `from_pretrained`."""
        return {
            "dtype": self.dtype,
            "mesh": self.mesh.config(),
            "lora": self.loras(),
            "ignore_text_encoder": self.ignore_text_encoder,
            "quantize": parse_quantize(self.quantize),
            "offload": self.offload,
            "reference_cache": self.reference_cache,
            "reference_cache_dtype": self.reference_cache_dtype,
            "reference_latents": self.reference_latents,
        }


def parse_lora(word: str) -> tuple[str, float]:
    """Parses FILE or FILE:WEIGHT. Raises: UsageError for an empty name, or a weight that is not a finite number."""
    name, colon, number = word.rpartition(":")
    if not colon or Path(word).exists() or number.startswith("//"):  # a URL without a weight
        name, number = word, "1"
    try:
        weight = float(number)
    except ValueError:
        raise UsageError(
            f"--lora {word}: {number!r} is not a weight; give FILE or FILE:WEIGHT, such as a:0.8"
        ) from None
    if not name or not math.isfinite(weight):
        raise UsageError(f"--lora {word}: give FILE or FILE:WEIGHT, with a finite weight")
    return name, weight


def parse_quantize(words: tuple[str, ...]) -> "Quantize":
    """Parses the words of --quantize: a format for all models, model -> format for some, None without words.

    Raises: UsageError for other words.
    """
    if not words:
        return None
    from clvr_jax.pipelines.loading import QUANTIZED_PARTS

    chosen: dict[str, Quantization] = {}
    for word in words:
        part, _, name = word.rpartition(":")
        if name != "int8" or part not in ("", *QUANTIZED_PARTS):
            raise UsageError(
                f"--quantize {word}: give int8, or one of {', '.join(f'{part}:int8' for part in QUANTIZED_PARTS)}"
            )
        chosen[part] = "int8"
    return "int8" if "" in chosen else chosen


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Parses HEIGHTxWIDTH or one number for both, in pixels. Raises: UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= min(height, width) <= max(height, width) <= _MAX_SIDE:
        raise UsageError(
            f"{option} {text}: give HEIGHTxWIDTH in pixels, such as 512x768, or one number, up to {_MAX_SIDE}"
        )
    return height, width


def check_model_size(size: tuple[int, int] | None, model: str) -> None:
    """Raises UsageError, with the nearest size, for one that a model cannot generate; reads its configuration only."""
    if size is not None:
        from clvr_jax.pipelines.images import check_size
        from clvr_jax.pipelines.registry import resolve, size_multiple

        path, _ = resolve(model)
        check_size(*size, size_multiple(path))


@dataclass(frozen=True)
class ImageOptions:
    """Options for the size of generated images, and for images of your own."""

    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Generate images of this height and width in pixels, or of this number for both. If not given, the size of the
    first --image, else the model's own."""
    image: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Edit or combine these images, PNG, JPEG or WebP, for FLUX.2 models. The model reads them as references, in this
    order."""

    def __post_init__(self) -> None:
        self.height_and_width()

    def height_and_width(self) -> tuple[int, int] | None:
        """Returns the size in pixels, None if not given. Raises: UsageError for an invalid size."""
        return None if self.size is None else parse_size(self.size)

    def check(self, model: str) -> "list[np.ndarray]":
        """Checks the size against a model's configuration and reads the given images, before any weights are read.

        Raises: UsageError for a size that the model cannot generate, and for images with a model that takes none;
          ClvrError for a file that is not an image.
        """
        if self.image:
            from clvr_jax.pipelines.registry import FLUX2, class_of, resolve

            path, _ = resolve(model)
            if (kind := class_of(path)) not in FLUX2:
                raise UsageError(f"--image: {model} is a {kind}, which takes no images; FLUX.2 models do")
        check_model_size(self.height_and_width(), model)
        from clvr_jax.files.image_io import read_image

        return [read_image(path) for path in self.image]

    def arguments(self, images: "list[np.ndarray]") -> dict[str, Any]:
        """Returns the arguments of a pipeline's call; only given ones, because not all pipelines take all of them."""
        from clvr_jax.files.image_io import as_pil

        size = self.height_and_width()
        given: dict[str, Any] = {} if size is None else {"height": size[0], "width": size[1]}
        return {**given, "images": [as_pil(image) for image in images]} if images else given


@dataclass(frozen=True)
class ControllerOptions:
    """Options for the model that controls the loop."""

    controller: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Plan and decide with this model: a shipped name, or a directory or Hugging Face id of a Qwen3-VL, trained for the
    loop or not. If not given, the controller/ of the model."""
    controller_url: Url = None
    """Plan and decide with a model behind this OpenAI-compatible chat API. Give the URL up to and including the
    version, such as http://localhost:8000/v1."""
    controller_model: Name = None
    """The server's name for the model behind --controller-url."""
    controller_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key of --controller-url; "" for a server without keys."""
    controller_tokens: Count = None
    """Allow this many tokens in a reply of the controller. If not given, 384 for a model that was trained for the loop,
    and 1024 for others; models that think first need more."""
    controller_max_seconds: float = 1200.0
    """Wait this many seconds at most for a whole reply of --controller-url, however slowly it comes."""
    prefix_cache: Annotated[float, tyro.conf.arg(metavar="GIB")] = 0.0
    """Let each Qwen3-VL keep the keys and values of earlier conversations in this much memory of each device, in GiB,
    so that a round of the loop reads only what is new in its conversation. If not given, nothing is kept."""

    def __post_init__(self) -> None:
        at_least_one("--controller-tokens", self.controller_tokens)
        if not 0 <= self.prefix_cache < math.inf:
            raise UsageError(f"--prefix-cache {self.prefix_cache}: give a finite number of GiB, at least 0")
        if bool(self.controller_url) != bool(self.controller_model):
            raise UsageError("--controller-url URL and --controller-model NAME must be given together")
        if self.controller and self.controller_url:
            raise UsageError("--controller and --controller-url name two controllers; give one of them")

    def check(self, model: str) -> None:
        """Checks the models of the loop before any weights are read.

        Raises: UsageError for a model that is not a FLUX.2; ClvrError for a controller that is missing or not a
          Qwen3-VL.
        """
        from clvr_jax.pipelines.registry import FLUX2, class_of, resolve

        path, _ = resolve(model)
        if (kind := class_of(path)) not in FLUX2:
            raise UsageError(
                f"--model {model}: a {kind}, which does not run in the closed loop; FLUX.2 models do (clvr sample "
                "generates with it in one shot)"
            )
        if not self.controller_url:
            from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory

            controller_directory(self.controller or model)

    def arguments(self, verifier: str | None, is_verified: bool) -> "RoleArguments":
        """Returns the arguments of `ClosedLoopPipeline.from_pretrained`.

        Args:
          verifier: the model that verifies; if None, the controller does so, in fresh conversations.
          is_verified: whether a separate verifier is needed at all.
        Raises: UsageError for a prefix cache without a Qwen3-VL; ClvrError if the key of the endpoint or the openai
          package is missing.
        """
        if self.prefix_cache and self.controller_url and not (verifier and is_verified):
            raise UsageError("--prefix-cache has no effect with --controller-url and no --verifier; leave it out")
        if not self.controller_url:
            roles: RoleArguments = {"verifier": verifier, "prefix_cache_gib": self.prefix_cache}
            if self.controller is not None:
                roles["controller"] = self.controller
            if self.controller_tokens is not None:
                roles["max_reply_tokens"] = self.controller_tokens
            return roles
        from clvr_jax.providers.endpoint import Endpoint
        from clvr_jax.providers.loop_roles import MAX_REPLY_TOKENS, ChatModelController
        from clvr_jax.providers.one_host import Host0ChatModel, Host0Controller
        from clvr_jax.providers.openai_chat import OpenAIChatModel
        from clvr_jax.reasoning.verification.model_verifier import ModelVerifier

        model = OpenAIChatModel(
            Endpoint(
                self.controller_model or "",
                self.controller_url,
                self.controller_key_variable or None,
                max_seconds=self.controller_max_seconds,
            )
        )
        tokens = self.controller_tokens or MAX_REPLY_TOKENS
        chosen_verifier: str | Verifier | None = verifier
        if is_verified and verifier is None:
            chosen_verifier = ModelVerifier(Host0ChatModel(model), "ask", max_tokens=tokens)
        controller = Host0Controller(ChatModelController(model, max_tokens=tokens))
        return {"controller": controller, "verifier": chosen_verifier, "prefix_cache_gib": self.prefix_cache}


Loading = Annotated[LoadOptions, tyro.conf.arg(name="")]
Images = Annotated[ImageOptions, tyro.conf.arg(name="")]
Control = Annotated[ControllerOptions, tyro.conf.arg(name="")]
