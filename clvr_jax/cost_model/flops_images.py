"""FLOPs of the convolutional models, computed from their configurations: the autoencoders and the UNet.

The conventions are those of `flops`. A convolution is counted for its complete window at every position; the compiler
does not count products with the padding, which matters for small images only.
"""

import itertools
from collections.abc import Sequence

from clvr_jax.cost_model.flops import Flops, attention_flops
from clvr_jax.models.common.autoencoder_blocks import AutoencoderConfig
from clvr_jax.models.stable_diffusion import UNet2DConditionConfig

WINDOW = 9
"""Positions in the window of a 3 x 3 convolution; all other convolutions are 1 x 1."""


def encoder_flops(config: AutoencoderConfig, batch: int, height: int, width: int) -> Flops:
    """Returns the FLOPs of encoding images of height x width pixels."""
    widths, pixels = config.block_out_channels, height * width
    products = pixels * WINDOW * config.in_channels * widths[0]
    for i, (wide_in, wide) in enumerate(itertools.pairwise((widths[0], *widths))):
        products += _resnets([wide_in] + [wide] * (config.layers_per_block - 1), wide, pixels)
        if i < len(widths) - 1:
            pixels //= 4
            products += pixels * WINDOW * wide * wide
    moments = 2 * config.latent_channels
    products += pixels * (WINDOW * widths[-1] * moments + config.use_quant_conv * moments * moments)
    return Flops(projections=2.0 * batch * products) + _middle(config, widths[-1], batch, pixels)


def decoder_flops(config: AutoencoderConfig, batch: int, height: int, width: int) -> Flops:
    """Returns the FLOPs of decoding images of height x width pixels."""
    widths, latents = config.decoder_widths[::-1], config.latent_channels
    pixels = height * width // config.downscale**2
    products = pixels * (config.use_post_quant_conv * latents * latents + WINDOW * latents * widths[0])
    middle = _middle(config, widths[0], batch, pixels)
    for i, (wide_in, wide) in enumerate(itertools.pairwise((widths[0], *widths))):
        products += _resnets([wide_in] + [wide] * config.layers_per_block, wide, pixels)
        if i < len(widths) - 1:
            pixels *= 4
            products += pixels * WINDOW * wide * wide
    products += pixels * WINDOW * widths[-1] * config.out_channels
    return Flops(projections=2.0 * batch * products) + middle


def unet_flops(config: UNet2DConditionConfig, batch: int, height: int, width: int, text: int) -> Flops:
    """Returns the FLOPs of one evaluation for latents of height x width and `text` tokens; guidance doubles the batch.

    Height and width must be even at every resolution but the lowest, so that downsampling loses no row or column.
    """
    widths, layers, last = config.block_out_channels, config.layers_per_block, len(config.block_out_channels) - 1
    embedding, pixels = 4 * widths[0], height * width
    sizes = config.projection_class_embeddings_input_dim if config.addition_embed_type else None
    embedders = (widths[0] + embedding) * embedding + (config.time_cond_proj_dim or 0) * widths[0]
    embedders += (sizes + embedding) * embedding if sizes else 0
    total = Flops(outside=2.0 * batch * embedders)

    def stage(block: int, widths_in: Sequence[int], transformers: int, pixels: int) -> Flops:
        wide, depth = widths[block], config.depths[block]
        # Matrices for each token: 4 of self-attention, 2 of cross-attention, 8 and 4 of the gated MLP.
        of_block = pixels * 18 * wide * wide + text * 2 * config.cross_attention_dim * wide
        products = _resnets(widths_in, wide, pixels) + len(widths_in) * embedding * wide
        products += transformers * (2 * pixels * wide * wide + depth * of_block)
        attention = attention_flops(pixels, pixels + text, wide)
        return Flops(projections=2.0 * batch * products, attention=batch * transformers * depth * attention)

    def convolution(pixels: int, wide_in: int, wide: int) -> Flops:
        return Flops(projections=2.0 * batch * pixels * WINDOW * wide_in * wide)

    wide, skips = widths[0], [widths[0]]
    total += convolution(pixels, config.in_channels, wide)
    for i, kind in enumerate(config.down_block_types):
        widths_in, wide = [wide] + [widths[i]] * (layers - 1), widths[i]
        total += stage(i, widths_in, layers * kind.startswith("Cross"), pixels)
        skips += [wide] * (layers + (i < last))
        if i < last:
            pixels //= 4
            total += convolution(pixels, wide, wide)
    total += stage(last, (wide, wide), 1, pixels)
    for i, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
        widths_in, wide = [w + skips.pop() for w in [wide] + [widths[i]] * layers], widths[i]
        total += stage(i, widths_in, (layers + 1) * kind.startswith("Cross"), pixels)
        if i > 0:
            pixels *= 4
            total += convolution(pixels, wide, wide)
    return total + convolution(pixels, wide, config.out_channels)


def _resnets(widths_in: Sequence[int], width: int, pixels: int) -> int:
    """Returns the multiplications of successive ResNet blocks, each with `width` output channels."""
    return pixels * sum(WINDOW * (w + width) * width + (w != width) * w * width for w in widths_in)


def _middle(config: AutoencoderConfig, width: int, batch: int, pixels: int) -> Flops:
    """Returns the FLOPs of the middle block: two ResNet blocks, with attention between them in some autoencoders."""
    attends = config.mid_block_add_attention
    products = _resnets([width, width], width, pixels) + attends * 4 * pixels * width * width
    return Flops(projections=2.0 * batch * products, attention=batch * attends * attention_flops(pixels, pixels, width))
