"""Settings of the small FLUX.2 pipeline of the tests."""

from clvr_jax.pipelines.flux2 import Flux2Settings

LENGTH = 64
SETTINGS = Flux2Settings(
    text_encoder_out_layers=(1, 2, 3), text_buckets=(LENGTH, 2 * LENGTH), sample_size=64, num_inference_steps=8,
    guidance_scale=3.0,
)  # fmt: skip
