"""FLOPs of the transformers, computed from their configurations: matrix products with weights, and attention.

A product of (m, k) and (k, n) is 2 m k n FLOPs. Norms, softmax, rotary embeddings and other elementwise operations are
not counted, as in published utilizations; at the published widths they are 1 to 2 % of the compiler's count. Attention
is counted without the mask, because the models compute all of it unless a kernel skips blocks.
Source: PaLM (Chowdhery et al., 2022), appendix B, model and hardware FLOPs.
"""

from dataclasses import dataclass, fields

from clvr_jax.errors import ClvrError
from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.models.qwen3.layers import DecoderConfig
from clvr_jax.models.qwen3_vl import Qwen3VLConfig, Qwen3VLVisionConfig
from clvr_jax.models.qwen3_vl.positions import Grids, merged_tokens


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of a batch on all devices together.

    projections: products with weights inside the blocks. attention: queries with keys, and weights with values.
    outside: embedders, heads and everything else outside of the blocks, which is never recomputed. last: the part of
    the projections whose results are only added to the residual stream, so that no gradient needs them.
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
        """Model FLOPs of a training step, as used for utilization: the backward pass counts as two forward passes."""
        return 3 * self.forward

    def hardware(self, remat: str, *, flash: bool = False) -> float:
        """Returns the hardware FLOPs of a training step, including recomputation.

        Args:
          remat: rematerialization policy, a name in `layers.REMAT`.
          flash: whether attention is a kernel that does not store its weights: its backward pass computes queries times
            keys again, and recomputes nothing else if the outputs of attention are kept.
        Raises: ClvrError for an unknown policy.
        """
        recomputed = {
            "dots": self.attention,
            "attention": self.projections - self.last + (0.0 if flash else self.attention / 2),
            "full": self.projections - self.last + self.attention,
        }
        if remat not in recomputed:
            raise ClvrError(f"remat {remat!r}: no such policy; the policies are {', '.join(recomputed)}")
        return self.training + recomputed[remat] + (self.attention / 2 if flash else 0.0)


def attention_flops(queries: int, keys: int, width: int) -> float:
    """Returns the FLOPs of both products of attention for one row: queries with keys, and weights with values.

    Args:
      queries, keys: numbers of tokens.
      width: number of heads times the head dimension.
    """
    return 4.0 * queries * keys * width


def flux2_flops(
    config: Flux2TransformerConfig, batch: int, *, text: int, image: int, references: int = 0, cached: int = 0
) -> Flops:
    """Returns the FLOPs of one evaluation of the FLUX.2 transformer for a batch.

    Args:
      config: of the transformer.
      batch: number of images; classifier-free guidance doubles it.
      text, image, references: number of tokens for one image; 1024 x 1024 pixels are 4096 tokens.
      cached: number of reference tokens whose keys and values are cached.
    """
    d = config.inner_dim
    image_tokens = image + references
    tokens = text + image_tokens
    embedder = (1 + config.guidance_embeds) * (config.timestep_guidance_channels * d + d * d)
    modulations = (2 * 6 + 3 + 2) * d * d  # two double-stream, one single-stream, the last norm
    ends = image_tokens * d * (config.in_channels + config.token_channels) + text * d * config.joint_attention_dim
    return Flops(
        projections=2.0 * batch * tokens * _flux2_block_weights(config),
        attention=batch * (config.num_layers + config.num_single_layers) * attention_flops(tokens, tokens + cached, d),
        outside=2.0 * batch * (embedder + modulations + ends),
    )


def reference_cache_flops(config: Flux2TransformerConfig, batch: int, *, references: int, earlier: int = 0) -> Flops:
    """Returns the FLOPs of the keys and values of reference tokens, which are computed once.

    Args:
      config: of the FLUX.2 transformer.
      batch: number of rows.
      references: number of tokens of a row.
      earlier: number of cached reference tokens that these attend to as well.
    """
    d = config.inner_dim
    embedder = (1 + config.guidance_embeds) * (config.timestep_guidance_channels * d + d * d)
    modulations = (6 + 3) * d * d  # of the image stream, and of the single-stream blocks
    depth = config.num_layers + config.num_single_layers
    return Flops(
        projections=2.0 * batch * references * _flux2_block_weights(config),
        attention=batch * depth * attention_flops(references, references + earlier, d),
        outside=2.0 * batch * (embedder + modulations + references * d * config.in_channels),
    )


def token_passes(reference_cache: str, *, steps: int, text: int, image: int, references: int) -> int:
    """Returns how many tokens pass through the FLUX.2 transformer for one image of a loop, over all steps.

    Args:
      reference_cache: how references are attended to, see `pipelines.flux2.settings.ReferenceMode`; with "loop", the
        caches of all references but the last are kept from earlier images.
      steps: number of network evaluations.
      text, image: number of tokens of the text, and of an image.
      references: number of earlier images.
    """
    tokens, cached = {
        "none": (text + image * (1 + references), 0),
        "image": (text + image, references * image),
        "loop": (text + image, min(references, 1) * image),
    }[reference_cache]
    return steps * tokens + cached


def _flux2_block_weights(config: Flux2TransformerConfig) -> int:
    """Returns the number of weights in the blocks that one token meets."""
    d, mlp = config.inner_dim, config.mlp_dim
    double = 4 * d * d + 3 * d * mlp
    single = d * (3 * d + 2 * mlp) + (d + mlp) * d
    return config.num_layers * double + config.num_single_layers * single


def decoder_flops(sizes: DecoderConfig, layers: int, batch: int, tokens: int, keys: int) -> Flops:
    """Returns the FLOPs of `layers` decoder layers of Qwen3 for `tokens` new tokens per row that attend to `keys`."""
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
    """Returns the FLOPs of Qwen3 for complete rows.

    Args:
      config: of the language model.
      batch, tokens: number of rows, and of tokens in each, padding included.
      layers: number of layers that are computed, all if None; those of a text encoder up to the last hidden state that
        is used, 27 for klein.
      logits: number of positions of a row with logits, all if None; 0 for a text encoder.
    """
    depth = config.num_hidden_layers if layers is None else layers
    head = 2.0 * batch * (tokens if logits is None else logits) * config.hidden_size * config.vocab_size
    return decoder_flops(config, depth, batch, tokens, tokens) + Flops(outside=head)


def qwen3_vl_vision_flops(config: Qwen3VLVisionConfig, grid_thw: Grids) -> Flops:
    """Returns the FLOPs of the vision tower for one row with images of these grids (frames, rows, columns)."""
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
    """Returns the FLOPs of Qwen3-VL for complete conversations.

    Args:
      config: of language model and vision tower.
      batch, tokens: number of conversations, and of tokens in each, visual tokens included.
      grid_thw: images of a conversation, as patches (frames, rows, columns); 1024 x 1024 pixels are (1, 64, 64).
      logits: number of positions of a conversation with logits, all if None.
    """
    text = config.text
    head = 2.0 * batch * (tokens if logits is None else logits) * text.hidden_size * text.vocab_size
    language = decoder_flops(text, text.num_hidden_layers, batch, tokens, tokens) + Flops(outside=head)
    return language + qwen3_vl_vision_flops(config.vision, grid_thw) * batch
