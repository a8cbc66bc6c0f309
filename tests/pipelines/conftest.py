"""Small pipelines with random weights, in directories; made once for all files, so tests only read them."""

import diffusers
import numpy as np
import pytest

from clvr_jax.data.preprocessing.text import load_tokenizer, train_tokenizer
from clvr_jax.models.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config, Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from tests.helpers.models import random_module
from tests.pipelines.flux2.settings import SETTINGS
from tests.pipelines.sdxl.models import components


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A pipeline folder with random weights, written by us."""
    path = tmp_path_factory.mktemp("pipeline")
    train_tokenizer(["a red circle", "user\n", "assistant\n"], 320, path / "tokenizer")
    vae = AutoencoderKLFlux2Config(
        block_out_channels=(16, 24, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8
    )
    encoder = Qwen3Config(320, 32, 48, 4, 4, 2, 8, tie_word_embeddings=True)
    transformer = Flux2TransformerConfig(
        in_channels=vae.token_channels, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=96, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    pipeline = Flux2Pipeline(
        random_module(lambda rngs: Flux2Transformer(transformer, rngs=rngs), 3),
        random_module(lambda rngs: AutoencoderKLFlux2(vae, rngs=rngs), 3),
        random_module(lambda rngs: Qwen3(encoder, rngs=rngs), 3),
        load_tokenizer(path / "tokenizer"),
        SETTINGS,
    )
    generator = np.random.default_rng(0)
    pipeline.vae.bn.running_mean[...] = generator.normal(size=16).astype(np.float32)
    pipeline.vae.bn.running_var[...] = generator.uniform(0.5, 2, 16).astype(np.float32)
    pipeline.save_pretrained(str(path / "model"))
    return path / "model"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """(SDXL or not, scheduler, UNet with an embedding of the guidance or not) -> a folder that diffusers wrote."""
    made = {}

    def folder(xl, scheduler, embeds_guidance=False):
        key = (xl, scheduler, embeds_guidance)
        if key not in made:
            kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
            made[key] = tmp_path_factory.mktemp("model")
            kind(**components(*key)).save_pretrained(made[key])
        return made[key]

    return folder
