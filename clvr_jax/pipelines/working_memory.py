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
from clvr_jax.convert.configs import from_known_fields
from clvr_jax.files.atomic_io import read_json
from clvr_jax.models.common.autoencoder_blocks import AutoencoderConfig
from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.pipelines.flux2 import Flux2Settings
from clvr_jax.pipelines.flux2.settings import MAX_REFERENCE_PIXELS
from clvr_jax.pipelines.registry import FLUX2, class_of, read_settings, resolve
from clvr_jax.sharding import MeshLayout


class ImageCall(NamedTuple):
    """The smallest call that a command makes: one image.

    height, width: of the image in pixels. transformer: configuration of the FLUX.2 transformer, None for other models;
    tokens: that it processes, text, image and references. vae: configuration of the autoencoder.
    """

    height: int
    width: int
    vae: AutoencoderConfig
    transformer: Flux2TransformerConfig | None = None
    tokens: int = 0


def flux2_settings(path: Path) -> Flux2Settings:
    """Returns the settings in the clvr.json of a FLUX.2 pipeline, which all of its transformers share."""
    given = read_settings(path, "flux2", "transformers")
    return from_known_fields(Flux2Settings, given.get("flux2", {}))


def image_call(
    model: str, size: tuple[int, int] | None = None, references: Sequence[tuple[int, int]] = ()
) -> ImageCall | None:
    """Returns the smallest call that generates an image; reads configurations only.

    Args:
      model: a shipped name or a directory in diffusers layout.
      size: height and width in pixels; those of the first reference, else the model's own, if None.
      references: height and width of each given image.
    Returns: None if neither the arguments nor the model have a size.
    """
    path, chosen = resolve(model)
    if class_of(path) != FLUX2:
        vae = AUTOENCODER_KL.config_from_dict(read_json(path / "vae" / "config.json"))
        own = UNET.config_from_dict(read_json(path / "unet" / "config.json")).sample_size
        if size is None and own is None:
            return None
        height, width = size or (own * vae.downscale, own * vae.downscale)
        return ImageCall(height, width, vae)
    settings = flux2_settings(path)
    vae = FLUX2_VAE.config_from_dict(read_json(path / "vae" / "config.json"))
    transformer = FLUX2_TRANSFORMER.config_from_dict(read_json(path / chosen / "config.json"))
    height, width = size or next(iter(references), (settings.sample_size, settings.sample_size))
    pixels = height * width + sum(min(h * w, MAX_REFERENCE_PIXELS) for h, w in references)
    tokens = min(settings.text_buckets) + pixels // vae.token_pixels**2
    return ImageCall(height, width, vae, transformer, tokens)


def working_bytes(call: ImageCall, dtype: np.dtype, layout: MeshLayout | None = None) -> int:
    """Returns the bytes that a call needs on one device besides the weights, at least.

    Args:
      call: the call; its one image is decoded by every device of a mesh.
      dtype: of the computation.
      layout: of the mesh; None is one device.
    """
    axes: Mapping[str, int] = {} if layout is None else layout.mesh.shape
    return dtype.itemsize * max(_decoding(call), _denoising(call) // axes.get("sequence", 1))


def _decoding(call: ImageCall) -> int:
    """Returns the elements of the first residual block at full resolution: its input, that normalized, its output."""
    channels, *wider = call.vae.decoder_widths
    elements: int = call.height * call.width * (channels + 2 * next(iter(wider), channels))
    return elements


def _denoising(call: ImageCall) -> int:
    """Returns the elements of the fused projection of a single-stream block: q, k, v, and both halves of its MLP."""
    if call.transformer is None:
        return 0
    return call.tokens * int(3 * call.transformer.inner_dim + 2 * call.transformer.mlp_dim)
