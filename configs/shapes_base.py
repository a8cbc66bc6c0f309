"""The base model of the shapes world: a FLUX.2 transformer and its Qwen3 text encoder, trained together: the
transformer from random weights, the encoder from a pretrained one (`configs/shapes_text_encoder.py`).

It generates images from prompts and from the reply of a first step, and edits an image by instruction, also where the
instruction ends a long conversation: later stages freeze the text encoder. It is not trained on histories of images.

    clvr train configs/shapes_base.py --out runs/shapes_base

Measured for the shipped weights, 32 training prompts of a kind, 28 steps, guidance 1.7: one to three objects with their
places and single objects 1.00 right, two objects .97, edits .94, 3 to 6 objects .13; 85 minutes on one core. (For its
first 4,380 steps free choices were random: at step 3,480 single objects were .34 right, two objects .00.)
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.configs.shapes_vae import MODEL as VAE
from clvr_jax.data.shapes import Example, continued_example, editing_example, generation_example, planned_example
from clvr_jax.data.text import encode_prompts, load_tokenizer
from clvr_jax.models.autoencoder_kl_flux2 import AutoencoderKLFlux2
from clvr_jax.models.flux2_transformer import Flux2Transformer, Flux2TransformerConfig
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.pipelines.flux2 import Flux2Pipeline, Flux2Settings
from clvr_jax.pipelines.flux2_io import load_text_encoder, load_vae
from clvr_jax.pipelines.flux2_programs import velocity_field
from clvr_jax.training import sft
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.initialization import scaled
from clvr_jax.training.trainer import Task, TrainConfig

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

SIMPLE = {"single_object": 0.08, "two_object": 0.2, "counting": 0.2, "colors": 0.12, "position": 0.2, "color_attr": 0.2}
COMPLEX = {"complex": 1.0}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of batch: how often it is sampled, its size, and the function that makes one example."""

    share: float
    batch_size: int
    example: Callable[[np.random.Generator], Example]


KINDS = (
    Kind(0.27, 32, partial(generation_example, weights=SIMPLE)),
    Kind(0.17, 24, partial(generation_example, weights=COMPLEX)),
    Kind(0.30, 32, planned_example),
    Kind(0.18, 24, editing_example),
    Kind(0.08, 16, continued_example),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of the run."""

    train: TrainConfig = TrainConfig(
        steps=6500,
        learning_rate=3e-3,
        muon_learning_rate=8e-3,
        b2=0.98,
        ema_decay=0.998,
        checkpoint=CheckpointConfig(save_interval_minutes=5),
    )
    """Configuration of the training."""
    vae: Path = Path("runs/shapes_vae/export/vae")
    """Use this autoencoder, a directory that `configs/shapes_vae.py` exported."""
    tokenizer: Path = Path("runs/shapes_tokenizer")
    """Use this tokenizer, a directory that `configs/shapes_tokenizer.py` wrote."""
    text_encoder: Path = Path("runs/shapes_text_encoder/export/text_encoder")
    """Start the text encoder from this one, a directory that `configs/shapes_text_encoder.py` exported."""
    dropout: float = 0.1
    """Replace this fraction of the texts by the empty text, so that the model can be sampled with classifier-free
    guidance."""
    shift: float = 2.5
    """Shift the training timesteps towards noise by this factor, as the sampler's schedule is shifted; 1 leaves them
    uniform."""


CONFIG = Config()


def batch(
    step: int, seed: int, tokenizer: Any, dropout: float, kinds: tuple[Kind, ...] = KINDS
) -> dict[str, np.ndarray]:
    """The batch of a step: ids and mask (b, t), references (b, r, 64, 64, 3) and target (b, 64, 64, 3) as uint8."""
    rng = np.random.default_rng((seed, step))
    drawn = examples(rng, kinds)
    return collate(drawn, tokenizer, rng.random(len(drawn)) < dropout)


def examples(rng: np.random.Generator, kinds: tuple[Kind, ...]) -> list[Example]:
    """A batch of one kind."""
    shares = np.array([kind.share for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    return [kind.example(rng) for _ in range(kind.batch_size)]


def collate(examples: list[Example], tokenizer: Any, dropped: np.ndarray) -> dict[str, np.ndarray]:
    """Examples with equally many references -> a batch; the texts that are `dropped` become the empty one.

    Unlike the pipeline and `GenerationExamples`, which pad every text to its own bucket, all are padded to the bucket
    of the longest: batches of these recipes are not sorted by length, and the model learns to read texts in any bucket.
    """
    texts = ["" if drop else example.text for example, drop in zip(examples, dropped, strict=True)]
    ids, mask = encode_prompts(tokenizer, texts, SETTINGS.text_buckets)
    references = np.stack([np.reshape(example.references, (-1, 64, 64, 3)) for example in examples]).astype(np.uint8)
    return {"ids": ids, "mask": mask, "references": references, "target": np.stack([e.target for e in examples])}


def drawing_loss(
    transformer: Flux2Transformer,
    text_encoder: Qwen3,
    vae: AutoencoderKLFlux2,
    data: dict[str, jax.Array],
    key: jax.Array,
    shift: float,
) -> jax.Array:
    """Flow matching on the target's latents under text and references."""
    count = data["references"].shape[1]

    def encode_text(ids: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.concatenate(text_encoder.hidden_states(ids, mask, SETTINGS.text_encoder_out_layers), axis=-1)

    return sft.drawing_loss(
        encode_text,
        lambda images: vae.encode_tokens(images).reshape(len(images), -1, VAE.token_channels),
        lambda references: velocity_field(transformer, references, GRID, [GRID] * count),
        data,
        key,
        shift,
    )


def task(config: Config) -> Task:
    """The run as the trainer takes it."""
    tokenizer = load_tokenizer(config.tokenizer)
    vae = load_vae(config.vae)
    rngs = nnx.Rngs(config.train.seed)
    transformer_def, transformer = nnx.split(Flux2Transformer(TRANSFORMER, rngs=rngs))
    transformer = scaled(transformer, TRANSFORMER_START)
    encoder_def, encoder = nnx.split(load_text_encoder(config.text_encoder))
    vae_def, vae_state = nnx.split(vae)

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        value = drawing_loss(
            nnx.merge(transformer_def, params["transformer"]),
            nnx.merge(encoder_def, params["text_encoder"]),
            nnx.merge(vae_def, frozen),
            data,
            key,
            config.shift,
        )
        kind = "edit" if data["references"].shape[1] else "draw"
        return value, {f"loss_{kind}": value}

    def export(ema: Any, directory: Path) -> None:
        pipeline = Flux2Pipeline(
            nnx.merge(transformer_def, ema["transformer"]),
            vae,
            nnx.merge(encoder_def, ema["text_encoder"]),
            tokenizer,
            SETTINGS,
        )
        pipeline.save_pretrained(str(directory), dtype="float16")

    return Task(
        name="shapes base",
        params={"transformer": transformer, "text_encoder": encoder},
        frozen=vae_state,
        loss=loss,
        batches=partial(batch, seed=config.train.seed, tokenizer=tokenizer, dropout=config.dropout),
        export=export,
    )
