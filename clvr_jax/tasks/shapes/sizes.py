"""Sizes, settings and initial scales of the small FLUX.2 of the shapes world."""

from clvr_jax.models.flux2 import AutoencoderKLFlux2Config, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3Config
from clvr_jax.pipelines.flux2 import Flux2Settings

# 32 pixels to a transformer's 32 latent channels would be FLUX.2's own ratio; an image here needs far fewer.
VAE = AutoencoderKLFlux2Config(
    block_out_channels=(16, 16, 32, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    sample_size=64,
)
TEXT_ENCODER = Qwen3Config(
    vocab_size=640,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
TRANSFORMER = Flux2TransformerConfig(
    in_channels=VAE.token_channels,
    num_layers=2,
    num_single_layers=6,
    attention_head_dim=32,
    num_attention_heads=4,
    joint_attention_dim=3 * TEXT_ENCODER.hidden_size,
    timestep_guidance_channels=64,
    axes_dims_rope=(8, 8, 8, 8),
    guidance_embeds=False,
)
SETTINGS = Flux2Settings(
    text_encoder_out_layers=(2, 3, 4),
    text_buckets=(28, 40, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    sample_size=64,
    num_inference_steps=28,
    guidance_scale=1.7,  # of 1, 1.7, 2.5 and 4 the best on training prompts, halfway through the run
    world="shapes",
)
# Tokens start loud, branches silent, heads able to look at a single token: at first a hidden state is its token, and
# what is learned is what to add to it.
TEXT_START = {"embed_tokens": TEXT_ENCODER.hidden_size**0.5, "o_proj|down_proj": 0.0, "q_norm|k_norm": 2.0}
TRANSFORMER_START = {"modulation|norm_out|proj_out": 0.0, "norm_q|norm_k|norm_added": 2.0}
GRID = (VAE.sample_size // VAE.token_pixels,) * 2
