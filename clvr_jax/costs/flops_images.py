"""FLOPs of the convolutional models, counted from their configurations: the autoencoders and the UNet.

As in `flops`: twice the multiplications of products with weights and of attention; elementwise work is left out. A
convolution is counted at every place of its window; the compiler leaves out what falls into the padding, which shows on
small images only.
"""

import itertools
from collections.abc import Sequence

from clvr_jax.costs.flops import Flops, attention_flops
from clvr_jax.models.autoencoder_blocks import AutoencoderConfig
from clvr_jax.models.unet_2d_condition import UNet2DConditionConfig

WINDOW = 9
"""Places under a 3 x 3 convolution, the only kind that mixes neighbors."""


def encoder_flops(config: AutoencoderConfig, batch: int, height: int, width: int) -> Flops:
    """Counts the FLOPs of encoding images of height x width pixels."""
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
    """Counts the FLOPs of decoding images of height x width pixels."""
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
    """One prediction for latents of height x width positions and `text` tokens; two passes of guidance are two batches.

    The state of a resolution on the way up has the size it had on the way down; sides are taken to be even there.
    """
    widths, layers, last = config.block_out_channels, config.layers_per_block, len(config.block_out_channels) - 1
    embedding, pixels = 4 * widths[0], height * width
    sizes = config.projection_class_embeddings_input_dim if config.addition_embed_type else None
    embedders = (widths[0] + embedding) * embedding + (config.time_cond_proj_dim or 0) * widths[0]
    embedders += (sizes + embedding) * embedding if sizes else 0
    total = Flops(outside=2.0 * batch * embedders)

    def stage(block: int, widths_in: Sequence[int], transformers: int, pixels: int) -> Flops:
        wide, depth = widths[block], config.depths[block]
        # Of a token: 4 matrices of self-attention, 2 of attention to the text, 8 and 4 of the gated MLP.
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
    """Multiplications of resnets one after another, each to `width` channels."""
    return pixels * sum(WINDOW * (w + width) * width + (w != width) * w * width for w in widths_in)


def _middle(config: AutoencoderConfig, width: int, batch: int, pixels: int) -> Flops:
    """Two resnets, and between them attention over all positions if the autoencoder has it."""
    attends = config.mid_block_add_attention
    products = _resnets([width, width], width, pixels) + attends * 4 * pixels * width * width
    return Flops(projections=2.0 * batch * products, attention=batch * attends * attention_flops(pixels, pixels, width))
