"""Lower bounds of the memory that generating an image needs besides the weights, from configurations alone.

Only the largest arrays of two programs are counted, which exist at the same time in every implementation. `clvr plan`
compiles the programs and gives all of their memory. For an image of 1024 x 1024 in bfloat16 on v6e-8 it plans 1.53 GiB
to decode it and 0.61 GiB to denoise it, where these bounds are 1.25 GiB and 0.24 GiB.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clvr_jax.convert.architectures import AUTOENCODER_KL, FLUX2_TRANSFORMER, FLUX2_VAE, UNET
from clvr_jax.files.atomic_io import read_json
from clvr_jax.models.common.autoencoder_blocks import AutoencoderConfig
from clvr_jax.models.common.quantization import Quantization
from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.pipelines.flux2 import Flux2Settings
from clvr_jax.pipelines.flux2.io import read_flux2_settings
from clvr_jax.pipelines.flux2.settings import MAX_REFERENCE_PIXELS, ReferenceMode
from clvr_jax.pipelines.registry import FLUX2, class_of, resolve
from clvr_jax.sharding import MeshLayout


class ImageCall(NamedTuple):
    """The smallest call that a command makes: one image.

    height, width: of the image in pixels. vae: configuration of the autoencoder. transformer: configuration of the
    FLUX.2 transformer, None for other models; tokens: that it processes in a step. cached_tokens: of references whose
    keys and values are cached, and which are no tokens of a step; is_cache_quantized: whether these are 8-bit integers.
    """

    height: int
    width: int
    vae: AutoencoderConfig
    transformer: Flux2TransformerConfig | None = None
    tokens: int = 0
    cached_tokens: int = 0
    is_cache_quantized: bool = False


def flux2_settings(path: Path, transformer: str = "transformer") -> Flux2Settings:
    """Returns the settings of a FLUX.2 pipeline for one of its transformers."""
    return read_flux2_settings(path, transformer, Flux2Settings)


def image_call(
    model: str,
    size: tuple[int, int] | None = None,
    references: Sequence[tuple[int, int]] = (),
    reference_cache: ReferenceMode | None = None,
    reference_cache_dtype: Quantization | None = None,
) -> ImageCall | None:
    """Returns the smallest call that generates an image; reads configurations only.

    Args:
      model: a shipped name or a directory in diffusers layout.
      size: height and width in pixels; those of the first reference, else the model's own, if None.
      references: height and width of each given image.
      reference_cache: how a FLUX.2 model attends to references; its own setting if None.
      reference_cache_dtype: format of cached keys and values; the dtype of the computation if None.
    Returns: None if neither the arguments nor the model have a size.
    """
    path, chosen = resolve(model)
    if class_of(path) not in FLUX2:
        vae = AUTOENCODER_KL.config_from_dict(read_json(path / "vae" / "config.json"))
        own = UNET.config_from_dict(read_json(path / "unet" / "config.json")).sample_size
        if size is None and own is None:
            return None
        height, width = size or (own * vae.downscale, own * vae.downscale)
        return ImageCall(height, width, vae)
    settings = flux2_settings(path, chosen)
    vae = FLUX2_VAE.config_from_dict(read_json(path / "vae" / "config.json"))
    transformer = FLUX2_TRANSFORMER.config_from_dict(read_json(path / chosen / "config.json"))
    height, width = size or next(iter(references), (settings.sample_size, settings.sample_size))
    own, seen = height * width, sum(min(h * w, MAX_REFERENCE_PIXELS) for h, w in references)
    cached = 0 if (reference_cache or settings.reference_cache) == "none" else seen
    tokens = min(settings.text_buckets) + (own + seen - cached) // vae.token_pixels**2
    cached_tokens = cached // vae.token_pixels**2
    return ImageCall(height, width, vae, transformer, tokens, cached_tokens, reference_cache_dtype == "int8")


def working_bytes(call: ImageCall, dtype: np.dtype, layout: MeshLayout | None = None) -> int:
    """Returns the bytes that a call needs on one device besides the weights, at least.

    Args:
      call: the call; its one image is decoded by every device of a mesh.
      dtype: of the computation.
      layout: of the mesh; None is one device.
    """
    axes: Mapping[str, int] = {} if layout is None else layout.mesh.shape
    denoising = dtype.itemsize * (_denoising(call) // axes.get("sequence", 1)) + _cache_bytes(call, dtype, layout)
    return max(dtype.itemsize * _decoding(call), denoising)


def _decoding(call: ImageCall) -> int:
    """Returns the elements of the first residual block at full resolution: its input, that normalized, its output."""
    channels, *wider = call.vae.decoder_widths
    elements: int = call.height * call.width * (channels + 2 * next(iter(wider), channels))
    return elements


def _denoising(call: ImageCall) -> int:
    """Returns the elements of the fused projection of a single-stream block: q, k, v, and both halves of its MLP."""
    if call.transformer is None:
        return 0
    return max(call.tokens, call.cached_tokens) * int(3 * call.transformer.inner_dim + 2 * call.transformer.mlp_dim)


def _cache_bytes(call: ImageCall, dtype: np.dtype, layout: MeshLayout | None) -> int:
    """Returns the bytes of the cached keys and values of all blocks that one device has: those of its heads."""
    if call.transformer is None:
        return 0
    config = call.transformer
    heads: tuple[int, ...] = (config.num_attention_heads,)
    if layout is not None:
        heads = layout.sharding(("heads",), heads).shard_shape(heads)
    blocks = config.num_layers + config.num_single_layers
    of_a_head = config.attention_head_dim * dtype.itemsize
    if call.is_cache_quantized:
        of_a_head = config.attention_head_dim + np.dtype(np.float32).itemsize  # with its scale
    return 2 * blocks * call.cached_tokens * heads[0] * of_a_head
