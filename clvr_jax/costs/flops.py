"""FLOPs of the transformers, counted from their configurations: products with weights and the products of attention.

A product of (m, k) and (k, n) is 2 m k n FLOPs. Norms, softmax, rotations and other elementwise work are left out, as
they are in published utilizations; at the published widths they are 1 to 2 % of what the compiler counts.
Attention is counted in full, masked or not: that is what the models compute without a kernel that skips blocks.
Source of the convention: PaLM (Chowdhery et al., 2022), appendix B, model and hardware FLOPs.
"""

from dataclasses import dataclass, fields

from clvr_jax.errors import ClvrError
from clvr_jax.models.flux2_transformer import Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3_layers import DecoderSizes
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.qwen3_vl_positions import Grids, merged_tokens
from clvr_jax.models.qwen3_vl_vision import Qwen3VLVisionConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass over a whole batch, all devices together.

    projections: products with weights inside the blocks. attention: queries with keys, and weights with values.
    outside: embedders, heads and what else is no part of a block, so never computed a second time.
    last: the part of the projections whose results are only added to, so that no gradient asks for them again.
    """

    projections: float = 0.0
    attention: float = 0.0
    outside: float = 0.0
    last: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> "Flops":
        return Flops(*(getattr(self, field.name) * times for field in fields(self)))

    @property
    def forward(self) -> float:
        """FLOPs of the forward pass."""
        return self.projections + self.attention + self.outside

    @property
    def training(self) -> float:
        """Model FLOPs of a training step, what utilization is measured by: the backward pass is two forward passes."""
        return 3 * self.forward

    def hardware(self, remat: str, *, flash: bool = False) -> float:
        """FLOPs that a training step really does, what is computed twice included.

        Args:
          remat: what the backward pass keeps of each block, a name in `layers.REMAT`.
          flash: attention is a kernel that never stores its weights: its backward pass multiplies queries and keys once
            more, but has nothing to compute again if what attention returned was kept.
        Raises: ClvrError for an unknown policy.
        """
        again = {
            "dots": self.attention,
            "attention": self.projections - self.last + (0.0 if flash else self.attention / 2),
            "full": self.projections - self.last + self.attention,
        }
        if remat not in again:
            raise ClvrError(f"remat {remat!r}: no such policy; there are {', '.join(again)}")
        return self.training + again[remat] + (self.attention / 2 if flash else 0.0)


def attention_flops(queries: int, keys: int, width: int) -> float:
    """Both products of attention for one row: (queries, width) with (keys, width) over all heads, and back."""
    return 4.0 * queries * keys * width


def flux2_flops(config: Flux2TransformerConfig, batch: int, *, text: int, image: int, references: int = 0) -> Flops:
    """One velocity of FLUX.2 for a batch.

    Args:
      config: sizes of the transformer.
      batch: number of images; classifier-free guidance doubles it.
      text, image, references: number of tokens for one image; 1024 x 1024 pixels are 4096 tokens.
    """
    d, mlp = config.inner_dim, config.mlp_dim
    image_tokens = image + references
    tokens = text + image_tokens
    embedder = (1 + config.guidance_embeds) * (config.timestep_guidance_channels * d + d * d)
    modulations = (2 * 6 + 3 + 2) * d * d  # two double-stream, one single-stream, the last norm
    ends = image_tokens * d * (config.in_channels + config.token_channels) + text * d * config.joint_attention_dim
    double = 4 * d * d + 3 * d * mlp
    single = d * (3 * d + 2 * mlp) + (d + mlp) * d
    depth = config.num_layers + config.num_single_layers
    return Flops(
        projections=2.0 * batch * tokens * (config.num_layers * double + config.num_single_layers * single),
        attention=batch * depth * attention_flops(tokens, tokens, d),
        outside=2.0 * batch * (embedder + modulations + ends),
    )


def decoder_flops(sizes: DecoderSizes, layers: int, batch: int, tokens: int, keys: int) -> Flops:
    """`layers` decoder layers of Qwen3 over `tokens` new tokens of each row, which attend to `keys` entries."""
    d, q = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    kv = sizes.num_key_value_heads * sizes.head_dim
    layer = 2 * d * q + 2 * d * kv + 3 * d * sizes.intermediate_size
    return Flops(
        projections=2.0 * layers * batch * tokens * layer,
        attention=layers * batch * attention_flops(tokens, keys, q),
        last=2.0 * layers * batch * tokens * d * sizes.intermediate_size,
    )


def qwen3_flops(
    config: Qwen3Config, batch: int, tokens: int, *, layers: int | None = None, logits: int | None = None
) -> Flops:
    """Qwen3 over whole rows.

    Args:
      config: sizes of the language model.
      batch, tokens: rows and tokens of each, padding included.
      layers: how many are run, all if None; a text encoder runs as many as its deepest hidden state, 27 for klein.
      logits: positions of a row that get logits, all if None, none if it is a text encoder (0).
    """
    depth = config.num_hidden_layers if layers is None else layers
    head = 2.0 * batch * (tokens if logits is None else logits) * config.hidden_size * config.vocab_size
    return decoder_flops(config, depth, batch, tokens, tokens) + Flops(outside=head)


def qwen3_vl_vision_flops(config: Qwen3VLVisionConfig, grid_thw: Grids) -> Flops:
    """The vision tower over images of these grids (frames, rows, columns of patches): one row of a batch."""
    d = config.hidden_size
    patches = sum(t * h * w for t, h, w in grid_thw)
    tokens = sum(merged_tokens(grid_thw, config.spatial_merge_size))
    merged = d * config.spatial_merge_size**2
    mergers = 1 + len(config.deepstack_visual_indexes)
    return Flops(
        projections=2.0 * config.depth * patches * (4 * d * d + 2 * d * config.intermediate_size),
        attention=config.depth * sum(t * attention_flops(h * w, h * w, d) for t, h, w in grid_thw),
        last=2.0 * config.depth * patches * d * config.intermediate_size,
        outside=2.0
        * (patches * config.patch_features * d + mergers * tokens * merged * (merged + config.out_hidden_size)),
    )


def qwen3_vl_flops(
    config: Qwen3VLConfig, batch: int, tokens: int, grid_thw: Grids = (), *, logits: int | None = None
) -> Flops:
    """Qwen3-VL over whole conversations.

    Args:
      config: sizes of both halves.
      batch, tokens: conversations and tokens of each, those of its images included.
      grid_thw: the images of one conversation, patches as (frames, rows, columns); 1024 x 1024 pixels are (1, 64, 64).
      logits: positions of a conversation that get logits, all if None.
    """
    text = config.text
    head = 2.0 * batch * (tokens if logits is None else logits) * text.hidden_size * text.vocab_size
    language = decoder_flops(text, text.num_hidden_layers, batch, tokens, tokens) + Flops(outside=head)
    return language + qwen3_vl_vision_flops(config.vision, grid_thw) * batch
