"""The text encoder of the shapes world begins as a language model of its world, as FLUX.2's Qwen3 does of ours.

It reads what the transformer will be conditioned on - prompts, and prompts with replies - and learns to continue it. A
plan that follows from a prompt teaches it which color belongs to which shape and place, which a transformer that is
trained together with an ignorant encoder finds out only very slowly.

    clvr train configs/shapes_language.py --out runs/shapes_language
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.data.text import encode_prompts, load_tokenizer
from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
from clvr_jax.pipelines.folder import save_text_encoder
from clvr_jax.training.initialization import scaled
from clvr_jax.training.objectives import next_token_loss
from clvr_jax.training.trainer import Task, TrainConfig

MODEL = Qwen3Config(
    vocab_size=640,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rope_theta=10_000.0,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)
# Who belongs to whom in a sentence is learned late if tokens drown in the sum of random branches. So tokens start loud,
# branches silent, and heads able to look at a single token.
START = {"embed_tokens": MODEL.hidden_size**0.5, "o_proj|down_proj": 0.0, "q_norm|k_norm": 2.0}
BUCKETS = (64, 96, 128, 160, 192, 224, 256, 320, 384)
STEPS = (0.45, 0.3, 0.15, 0.1)
"""How often a text ends with the first, second, ... reply."""


@dataclasses.dataclass(frozen=True)
class Config:
    """tokenizer: folder made by its recipe. batch_size: texts a step."""

    train: TrainConfig = TrainConfig(steps=1500, learning_rate=1.5e-3, b2=0.98, ema_decay=0.995)
    tokenizer: Path = Path("runs/shapes_tokenizer")
    batch_size: int = 32


CONFIG = Config()


def batch(step: int, seed: int, size: int, tokenizer: Any) -> dict[str, np.ndarray]:
    """The batch of a step: texts that end with the same reply of their trajectories; ids and mask (b, t)."""
    rng = np.random.default_rng((seed, step))
    last = int(rng.choice(len(STEPS), p=STEPS))
    texts: list[str] = []
    while len(texts) < size:
        trajectory = simulate_trajectory(rng, random_plan=False)
        if len(trajectory.canvases) > last:
            texts.append(trajectory.example(last).text)
    ids, mask = encode_prompts(tokenizer, texts, BUCKETS)
    return {"ids": ids, "mask": mask}


def task(config: Config) -> Task:
    """The run as the trainer takes it."""
    tokenizer = load_tokenizer(config.tokenizer)
    graphdef, params = nnx.split(Qwen3(MODEL, rngs=nnx.Rngs(config.train.seed)))

    def loss(params: Any, frozen: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = nnx.merge(graphdef, params)(data["ids"], data["mask"])
        return next_token_loss(logits, data["ids"], data["mask"].astype(logits.dtype))

    return Task(
        name="shapes language",
        params=scaled(params, START),
        frozen={},
        loss=loss,
        batches=partial(batch, seed=config.train.seed, size=config.batch_size, tokenizer=tokenizer),
        export=lambda ema, folder: save_text_encoder(folder / "text_encoder", nnx.merge(graphdef, ema), "float16"),
    )
