"""Pretraining of the text encoder of the shapes world: it predicts what a text describes, cell by cell."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from clvr_jax.convert.architectures import QWEN3
from clvr_jax.convert.models import save_model
from clvr_jax.data.preprocessing.text import encode_prompts, load_tokenizer
from clvr_jax.data.shapes import Image, generation_example, planned_example
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.qwen3 import Qwen3
from clvr_jax.tasks.shapes.batches import COMPLEX, SIMPLE, Kind, examples
from clvr_jax.tasks.shapes.cell_queries import CellQueries
from clvr_jax.tasks.shapes.sizes import SETTINGS, TEXT_ENCODER, TEXT_START
from clvr_jax.training.optimization.initialization import scaled
from clvr_jax.training.trainer import Task
from clvr_jax.trees import Batch, Params
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.scene import CELLS, COLORS, SHAPES

KINDS = (
    Kind(0.5, 64, planned_example),
    Kind(0.25, 64, partial(generation_example, weights=SIMPLE)),
    Kind(0.25, 48, partial(generation_example, weights=COMPLEX)),
)
"""Texts that name all objects of their image, half of them with places; an instruction to edit names fewer."""


class CellReader(CellQueries):
    """A prediction head: nine queries, one for each cell, attend to a text and predict color and shape, or nothing."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        super().__init__(features, rngs=rngs)
        self.color = nnx.Linear(self.width, 1 + len(COLORS), rngs=rngs)
        self.shape = nnx.Linear(self.width, 1 + len(SHAPES), rngs=rngs)

    def __call__(self, text_btd: jax.Array, mask_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps (b, t, features) and (b, t) to logits of color (b, 9, 9) and shape (b, 9, 6); class 0 is nothing."""
        read = self.read(text_btd, mask_bt)
        return self.color(read), self.shape(read)


def contents(image: Image) -> np.ndarray:
    """Returns (9, 2) int32: 1 + color and 1 + shape of every cell of an image, 0 for an empty cell."""
    cells = np.zeros((len(CELLS), 2), np.int32)
    for item in detect(image).objects:
        cells[CELLS.index(item.cell)] = 1 + list(COLORS).index(item.color), 1 + SHAPES.index(item.shape)
    return cells


def text_batch(step: int, seed: int, tokenizer: Tokenizer, kinds: tuple[Kind, ...] = KINDS) -> dict[str, np.ndarray]:
    """Returns the texts of a base batch, ids and mask (b, t), and the contents of their images, cells (b, 9, 2)."""
    chosen = examples(np.random.default_rng((seed, step)), kinds)
    ids, mask = encode_prompts(tokenizer, [example.text for example in chosen], SETTINGS.text_buckets)
    return {"ids": ids, "mask": mask, "cells": np.stack([contents(example.target) for example in chosen])}


def text_encoder_task(tokenizer: Path, *, seed: int) -> Task:
    """Returns the task of training the text encoder from random weights; its prediction head is not exported.

    Args:
      tokenizer: directory of the tokenizer.
      seed: of the initial weights and of the batches.
    """
    words = load_tokenizer(tokenizer)
    rngs = nnx.Rngs(seed)
    encoder_def, encoder = nnx.split(Qwen3(TEXT_ENCODER, rngs=rngs))
    features = len(SETTINGS.text_encoder_out_layers) * TEXT_ENCODER.hidden_size
    reader_def, reader = nnx.split(CellReader(features, rngs=rngs))

    def loss(params: Params, frozen: Params, data: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        encoder = nnx.merge(encoder_def, params["text_encoder"])
        hidden = encoder.hidden_states(data["ids"], data["mask"], SETTINGS.text_encoder_out_layers)
        logits = nnx.merge(reader_def, params["reader"])(jnp.concatenate(hidden, axis=-1), data["mask"])
        wanted = [data["cells"][..., part] for part in (0, 1)]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        value = sum(cross_entropy(*pair).sum(-1).mean() for pair in zip(logits, wanted, strict=True))
        right = jnp.stack([one.argmax(-1) == other for one, other in zip(logits, wanted, strict=True)]).all(0)
        full = wanted[0] > 0
        return jnp.asarray(value), {"object_accuracy": (right & full).sum() / jnp.maximum(full.sum(), 1)}

    return Task(
        name="shapes text encoder",
        params={"text_encoder": scaled(encoder, TEXT_START), "reader": reader},
        frozen={},
        loss=loss,
        batches=partial(text_batch, seed=seed, tokenizer=words),
        export=lambda ema, directory: save_model(
            directory / "text_encoder", nnx.merge(encoder_def, ema["text_encoder"]), QWEN3, "float16"
        ),
    )
