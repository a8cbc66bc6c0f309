"""Small models with the classes and tokenizers of the shipped ones, and random weights."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from clvr_jax.models.common.abstract import abstract_module
from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.trees import leaves_by_path

Module = TypeVar("Module", bound=nnx.Module)


def random_module(make: Callable[[nnx.Rngs], Module], seed: int = 0) -> Module:
    """Returns a module with random kernels from NumPy; Flax would compile a program for each shape and each key.

    Args:
      make: rngs -> module.
      seed: of the kernels, which have Flax's standard deviation. Scales and variances are 1, all else is 0.
    """
    module, rng = abstract_module(make), np.random.default_rng(seed)
    state = nnx.state(module)
    values = []
    for path, leaf in leaves_by_path(state).items():
        if path[-1] in ("kernel", "embedding"):
            inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 3 else leaf.shape[-2]
            deviation = (leaf.shape[-1] if path[-1] == "embedding" else inputs) ** -0.5
            value = deviation * rng.standard_normal(leaf.shape)
        else:
            value = np.full(leaf.shape, path[-1] in ("scale", "running_var"))
        # `jnp.asarray` of a NumPy array is a program that is compiled for each shape; `device_put` is none.
        values.append(jax.device_put(value.astype(leaf.dtype)))
    nnx.update(module, jax.tree.unflatten(jax.tree.structure(state), values))
    return module


def small_flux2(model: str, num_layers: int = 1, num_single_layers: int = 1) -> Flux2Pipeline:
    """Returns a shipped pipeline whose transformer has few blocks and random weights."""
    pipeline = Flux2Pipeline.from_pretrained(model)
    config = pipeline.transformer.config
    config = dataclasses.replace(config, num_layers=num_layers, num_single_layers=num_single_layers)
    pipeline.transformer = random_module(lambda rngs: Flux2Transformer(config, rngs=rngs))
    return pipeline


def save_small_qwen3_vl(directory: Path) -> Path:
    """Saves the shipped controller with two blocks in each tower and random weights; returns the directory."""
    chat = Qwen3VLPipeline.from_pretrained(SHIPPED / "shapes-tiny" / "controller")
    sizes = chat.model.config
    text = dataclasses.replace(sizes.text, num_hidden_layers=2)
    vision = dataclasses.replace(sizes.vision, depth=2, deepstack_visual_indexes=(0,))
    config = dataclasses.replace(sizes, text=text, vision=vision)
    model = random_module(lambda rngs: Qwen3VL(config, rngs=rngs))
    Qwen3VLPipeline(model, chat.tokenizer, chat.image_processor).save_pretrained(directory)
    return directory


def save_qwen3_vl_that_says(reply: str, small_qwen3_vl: Path, directory: Path) -> Path:
    """Saves a small Qwen3-VL that always gives one reply: its layers add nothing, and each token decides the next one.

    Args:
      reply: its tokens must all be different.
      small_qwen3_vl: see `save_small_qwen3_vl`.
      directory: where the model is saved; it is returned.
    """
    chat = Qwen3VLPipeline.from_pretrained(small_qwen3_vl)
    model: Qwen3VL = chat.model
    layers = model.model.language_model.layers
    layers.self_attn.o_proj.kernel[...] *= 0
    layers.mlp.down_proj.kernel[...] *= 0
    embedding = np.random.default_rng(0).normal(size=model.model.language_model.embed_tokens.embedding.shape)
    said = [chat.tokenizer("\n")["input_ids"][-1], *chat.tokenizer(reply)["input_ids"]]
    assert len(set(said)) == len(said), "a token occurs twice"
    head = np.zeros(embedding.T.shape, np.float32)
    for token, following in itertools.pairwise(said):
        head[:, following] = embedding[token]
    model.model.language_model.embed_tokens.embedding[...] = jax.device_put(embedding.astype(np.float32))
    model.lm_head.kernel[...] = jax.device_put(head)
    chat.save_pretrained(directory)
    return directory
