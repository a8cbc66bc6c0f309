"""The vision tower of Qwen3-VL: maps patches of images to tokens of the language model and DeepStack features.

Source: `Qwen3VLVisionModel` (transformers); attribute names are its keys.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clvr_jax.errors import ClvrError
from clvr_jax.models.common.attention import attention
from clvr_jax.models.common.dtypes import Dtypes
from clvr_jax.models.common.layers import scan_blocks, stack_blocks
from clvr_jax.models.qwen3_vl.image_buckets import patch_positions
from clvr_jax.models.qwen3_vl.positions import Grids, interpolation_taps, vision_rotary

NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Qwen3VLVisionConfig:
    """Configuration of the vision tower, with the fields of transformers' `vision_config` and defaults of the 8B model.

    deepstack_visual_indexes: blocks whose output is also passed to the language model, in increasing order.
    num_position_embeddings: number of entries of the square table of learned positions.
    """

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    out_hidden_size: int = 4096
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ClvrError(
                f"Qwen3-VL vision: hidden_size {self.hidden_size} must be a multiple of 4 x num_heads "
                f"({self.num_heads}), for rotary positions of rows and columns"
            )
        if self.positions_per_side**2 != self.num_position_embeddings:
            raise ClvrError(f"Qwen3-VL vision: num_position_embeddings {self.num_position_embeddings} must be a square")
        indexes = self.deepstack_visual_indexes
        if not indexes or list(indexes) != sorted(set(indexes)) or not 0 <= indexes[0] <= indexes[-1] < self.depth:
            raise ClvrError(
                f"Qwen3-VL vision: deepstack_visual_indexes {indexes} must be one or more increasing block numbers "
                f"below depth {self.depth}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def positions_per_side(self) -> int:
        """Number of rows, and of columns, of the table of learned positions."""
        found: int = round(self.num_position_embeddings**0.5)
        return found

    @property
    def patch_features(self) -> int:
        """Number of values in one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


class VisionFeatures(NamedTuple):
    """The inputs of the language model from images.

    tokens_bnd: (b, merged tokens, out_hidden_size), which replace the embeddings of image placeholders.
    deepstack_kbnd: (len(deepstack_visual_indexes), b, merged tokens, out_hidden_size), added after language layer k.
    hidden_lbnd: (depth, b, patches, hidden_size), the output of every block; None unless requested.
    """

    tokens_bnd: Float[Array, "b n d"]
    deepstack_kbnd: Float[Array, "k b n d"]
    hidden_lbnd: Float[Array, "l b m e"] | None = None

    def packed(self) -> "VisionFeatures":
        """Returns the features of all rows, one after another in one row, without those of the blocks."""
        tokens_1nd = self.tokens_bnd.reshape(1, -1, self.tokens_bnd.shape[-1])
        return VisionFeatures(tokens_1nd, self.deepstack_kbnd.reshape(-1, *tokens_1nd.shape))


def concatenated(rows: Sequence[VisionFeatures]) -> VisionFeatures:
    """Returns the features of several rows of images, each packed, in one row."""
    tokens_1nd = jnp.concatenate([row.tokens_bnd for row in rows], axis=1)
    return VisionFeatures(tokens_1nd, jnp.concatenate([row.deepstack_kbnd for row in rows], axis=2))


class _Patches(NamedTuple):
    """Positions of the n patches of each row, and which of them attend to each other.

    cos, sin: rotary table, (n, head_dim), or (b, n, head_dim) if it differs between rows. taps, weights: of the learned
    positions, (..., n, 4). runs: (number, patches) of consecutive frames of equal size; patches attend to those of
    their frame. valid_mask_bn: (b, n), False at padding; None without padding.
    """

    cos: jax.Array
    sin: jax.Array
    taps: jax.Array
    weights: jax.Array
    runs: tuple[tuple[int, int], ...]
    valid_mask_bn: jax.Array | None = None


class _PatchEmbed(nnx.Module):
    def __init__(self, config: Qwen3VLVisionConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        kernel_size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nnx.Conv(config.in_channels, config.hidden_size, kernel_size, rngs=rngs, **dtypes)

    def __call__(self, patches_bnp: jax.Array) -> jax.Array:
        # A convolution whose stride equals its window is a matrix product of flattened patches (c, t, h, w).
        kernel = self.proj.kernel[...]
        matrix_pd = kernel.transpose(3, 0, 1, 2, 4).reshape(-1, kernel.shape[-1])
        bias = self.proj.bias
        assert bias is not None
        patches_bnp, matrix_pd, bias_d = promote_dtype((patches_bnp, matrix_pd, bias[...]), dtype=self.proj.dtype)
        return patches_bnp @ matrix_pd + bias_d


class _Attention(nnx.Module):
    def __init__(self, config: Qwen3VLVisionConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.num_heads = config.num_heads
        self.qkv = nnx.Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs, **dtypes)
        self.proj = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs, **dtypes)

    def __call__(self, x_bnd: jax.Array, patches: "_Patches") -> jax.Array:
        b, n, d = x_bnd.shape
        qkv = self.qkv(x_bnd).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query, key = (_rotate(part, patches.cos, patches.sin) for part in (query, key))
        outs, start = [], 0
        for frames, length in patches.runs:
            stop = start + frames * length
            frame_shape = (b * frames, length, *query.shape[2:])
            parts = (part[:, start:stop].reshape(frame_shape) for part in (query, key, value))
            outs.append(attention(*parts, key_mask_bk=patches.valid_mask_bn).reshape(b, frames * length, d))
            start = stop
        return self.proj(outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1))


def _rotate(x_bnhk: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    x = x_bnhk.astype(jnp.float32)
    low, high = jnp.split(x, 2, axis=-1)
    rotated = x * cos[..., None, :] + jnp.concatenate([-high, low], axis=-1) * sin[..., None, :]
    return rotated.astype(x_bnhk.dtype)


class _MLP(nnx.Module):
    def __init__(self, config: Qwen3VLVisionConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.linear_fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs, **dtypes)
        self.linear_fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs, **dtypes)

    def __call__(self, x_bnd: jax.Array) -> jax.Array:
        return self.linear_fc2(nnx.gelu(self.linear_fc1(x_bnd), approximate=True))


def _layer_norm(features: int, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, is inaccurate for features that are far from zero, as in deep towers.
    return nnx.LayerNorm(features, epsilon=NORM_EPS, use_fast_variance=False, rngs=rngs, **dtypes)


class _Block(nnx.Module):
    def __init__(self, config: Qwen3VLVisionConfig, *, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.norm1 = _layer_norm(config.hidden_size, rngs=rngs, **dtypes)
        self.norm2 = _layer_norm(config.hidden_size, rngs=rngs, **dtypes)
        self.attn = _Attention(config, rngs=rngs, **dtypes)
        self.mlp = _MLP(config, rngs=rngs, **dtypes)

    def __call__(self, x_bnd: jax.Array, patches: "_Patches") -> jax.Array:
        x_bnd = x_bnd + self.attn(self.norm1(x_bnd), patches)
        return x_bnd + self.mlp(self.norm2(x_bnd))


class _PatchMerger(nnx.Module):
    """Merges merge x merge adjacent patches into one token with the width of the language model."""

    def __init__(self, config: Qwen3VLVisionConfig, *, norm_merged: bool, rngs: nnx.Rngs, **dtypes: Unpack[Dtypes]):
        self.norm_merged = norm_merged
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.norm = _layer_norm(self.merged if norm_merged else config.hidden_size, rngs=rngs, **dtypes)
        self.linear_fc1 = nnx.Linear(self.merged, self.merged, rngs=rngs, **dtypes)
        self.linear_fc2 = nnx.Linear(self.merged, config.out_hidden_size, rngs=rngs, **dtypes)

    def __call__(self, x_bnd: jax.Array) -> jax.Array:
        shape = (x_bnd.shape[0], -1, self.merged)
        merged = self.norm(x_bnd.reshape(shape)) if self.norm_merged else self.norm(x_bnd).reshape(shape)
        return self.linear_fc2(nnx.gelu(self.linear_fc1(merged), approximate=False))


class Qwen3VLVision(nnx.Module):
    """The vision tower, a transformer over patches with full attention inside an image and none between images.

    Args:
      config: configuration.
      rngs: random streams for the initial weights.
      dtype: of the computation. param_dtype: of the weights.
      remat: rematerialization policy of the blocks, a name in `layers.REMAT`.
    Source: `Qwen3VLVisionModel` (transformers).
    """

    def __init__(
        self,
        config: Qwen3VLVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "dots",
    ):
        self.config = config
        self.remat = remat
        dtypes: Dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.patch_embed = _PatchEmbed(config, rngs=rngs, **dtypes)
        self.pos_embed = nnx.Embed(config.num_position_embeddings, config.hidden_size, rngs=rngs, **dtypes)
        self.blocks = stack_blocks(lambda rngs: _Block(config, rngs=rngs, **dtypes), config.depth, rngs)
        self.merger = _PatchMerger(config, norm_merged=False, rngs=rngs, **dtypes)
        self.deepstack_merger_list = stack_blocks(
            lambda rngs: _PatchMerger(config, norm_merged=True, rngs=rngs, **dtypes),
            len(config.deepstack_visual_indexes),
            rngs,
        )

    def __call__(
        self,
        pixel_values_bnp: Float[Array, "b n p"],
        grid_thw: Grids | Int[Array, "b 3"],
        *,
        return_hidden: bool = False,
    ) -> VisionFeatures:
        """Encodes the images of b rows with the same grids, or b images of any size.

        Args:
          pixel_values_bnp: (b, patches, channels * frames * patch height * patch width), normalized; the images of a
            row are concatenated, each in merge-block order (see `clvr_jax.data.preprocessing.qwen3_vl_images`).
          grid_thw: static (frames, rows, columns) of patches for each image of a row; or traced (b, 3), the grid of the
            one image of each row, which has one frame and padding behind its patches.
          return_hidden: whether to return the output of every block too.
        Raises: ClvrError if grids and pixel_values disagree.
        """
        config = self.config
        patches = self._patches(pixel_values_bnp.shape, grid_thw)
        taps_n4d = self.pos_embed(patches.taps)
        learned = (taps_n4d * patches.weights[..., None]).sum(axis=-2).astype(taps_n4d.dtype)
        hidden_bnd = self.patch_embed(pixel_values_bnp) + learned

        # DeepStack blocks write into their slots of a buffer, all others into one more slot, which is not used. So one
        # scan is enough; slices of the stacked weights would be copies.
        kept = len(config.deepstack_visual_indexes)
        slots = np.full(config.depth, kept, dtype=np.int32)
        slots[list(config.deepstack_visual_indexes)] = np.arange(kept)
        buffer_kbnd = jnp.zeros((kept + 1, *hidden_bnd.shape), hidden_bnd.dtype)

        def step(
            block: _Block, carry: tuple[jax.Array, jax.Array], slot: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
            hidden, buffer = carry
            hidden = block(hidden, patches)
            buffer = jax.lax.dynamic_update_index_in_dim(buffer, hidden, slot, 0)
            return (hidden, buffer), hidden if return_hidden else None

        (hidden_bnd, buffer_kbnd), hidden_lbnd = scan_blocks(
            self.blocks, step, (hidden_bnd, buffer_kbnd), jnp.asarray(slots), remat=self.remat
        )
        graphdef, state = nnx.split(self.deepstack_merger_list)
        deepstack_kbnd = jax.vmap(lambda weights, x: nnx.merge(graphdef, weights)(x))(state, buffer_kbnd[:kept])
        return VisionFeatures(self.merger(hidden_bnd), deepstack_kbnd, hidden_lbnd)

    def _patches(self, shape: tuple[int, ...], grid_thw: Grids | jax.Array) -> _Patches:
        config, merge = self.config, self.config.spatial_merge_size
        side, head_dim, theta = config.positions_per_side, config.head_dim, config.rope_theta
        if isinstance(grid_thw, tuple):
            _check_patches(shape, grid_thw, config)
            frames = [h * w for t, h, w in grid_thw for _ in range(t)]
            runs = tuple((len(list(equal)), length) for length, equal in itertools.groupby(frames))
            cos, sin = map(jnp.asarray, vision_rotary(grid_thw, merge, head_dim, theta))
            taps, weights = map(jnp.asarray, interpolation_taps(grid_thw, side, merge))
            return _Patches(cos, sin, taps, weights, runs)
        if len(shape) != 3 or grid_thw.shape != (shape[0], 3) or shape[1] % merge**2:
            raise ClvrError(
                f"Qwen3-VL vision: pixel_values have shape {shape}, grids {grid_thw.shape}; traced grids need (b, n, "
                f"features) and (b, 3), where n is a multiple of {merge**2}"
            )
        found = patch_positions(grid_thw, shape[1], side=side, merge=merge, head_dim=head_dim, theta=theta)
        return _Patches(found.cos, found.sin, found.taps, found.weights, ((1, shape[1]),), found.valid_mask)


def _check_patches(shape: tuple[int, ...], grid_thw: Grids, config: Qwen3VLVisionConfig) -> None:
    expected = (sum(t * h * w for t, h, w in grid_thw), config.patch_features)
    if len(shape) != 3 or shape[1:] != expected:
        raise ClvrError(
            f"Qwen3-VL vision: pixel_values have shape {shape}, grids {grid_thw} with patch size {config.patch_size} "
            f"need (b, {expected[0]}, {expected[1]})"
        )
