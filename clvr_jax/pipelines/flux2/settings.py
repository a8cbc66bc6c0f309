"""The settings and the output of a FLUX.2 pipeline, and the sizes of the published models."""

import dataclasses
from typing import Any, Literal

from clvr_jax.errors import ClvrError
from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config

MAX_REFERENCE_PIXELS = 1024 * 1024
"""Larger references are scaled down to this number of pixels."""

KLEIN = {
    "klein-4b": (Flux2TransformerConfig.klein_4b(), Qwen3Config.qwen3_4b()),
    "klein-9b": (Flux2TransformerConfig.klein_9b(), Qwen3Config.qwen3_8b()),
}
"""Configurations of transformer and text encoder of the published models."""


ReferenceMode = Literal["none", "image", "loop"]
"""How an image attends to its references.

"none": as tokens that are computed in every step, and that attend to text and image. "image": references attend to each
other only, as at timestep 0, so that their keys and values are computed once for an image. "loop": reference k attends
to references 1 to k, so that its keys and values also hold for the later images of a loop.
"""


ReferenceLatents = Literal["encoded", "kept"]
"""Which latents a generated image has when it becomes a reference of a later image in a loop.

"encoded": those of the image, which was decoded and rounded to 8 bits, as with any other image. "kept": those that it
was decoded from, without that error.
"""


@dataclasses.dataclass(frozen=True)
class Flux2Settings:
    """Settings of a pipeline in `clvr.json` and `model_index.json`; the defaults are those of FLUX.2 klein.

    text_encoder_out_layers: hidden states that condition the transformer. text_buckets: numbers of tokens that texts
    are padded to (padding is attended to, so these belong to the model); a history that is longer than all of them
    loses its oldest replies. sample_size: height and width in pixels if none are given. is_distilled: guidance is never
    used. num_inference_steps, guidance_scale: the model's defaults. reference_cache: how the model was trained to
    attend to references, see `ReferenceMode`. reference_latents: which latents generated images have as references, see
    `ReferenceLatents`. world: the only world whose language a small model knows, "" for others.
    """

    text_encoder_out_layers: tuple[int, ...] = (9, 18, 27)
    text_buckets: tuple[int, ...] = (512, 1024, 1536, 2048)
    sample_size: int = 1024
    is_distilled: bool = False
    num_inference_steps: int = 28
    guidance_scale: float = 4.0
    reference_cache: ReferenceMode = "none"
    reference_latents: ReferenceLatents = "encoded"
    world: str = ""

    def __post_init__(self) -> None:
        if not self.text_buckets or not 1 <= min(self.text_buckets) <= max(self.text_buckets) <= 2**17:
            raise ClvrError(f"text_buckets {self.text_buckets}: give numbers of tokens from 1 to {2**17}")
        if not 1 <= self.num_inference_steps <= 1000 or not 1 <= self.sample_size <= 2**15:
            raise ClvrError("num_inference_steps must be from 1 to 1000, and sample_size from 1 to 32768")


class AbandonedError(ClvrError):
    """The caller abandoned a generation between two steps."""


@dataclasses.dataclass(frozen=True)
class Flux2Output:
    """Generated images.

    images: PIL images, or float32 (b, h, w, 3) in [0, 1]; None for one that was abandoned. nfe: number of transformer
    evaluations for each image.
    """

    images: Any
    nfe: int
