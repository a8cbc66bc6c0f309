"""Small models with the classes and tokenizers of the shipped ones, and random weights."""

import dataclasses
from pathlib import Path

from flax import nnx

from clvr_jax.models.flux2 import Flux2Transformer
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import SHIPPED


def small_flux2(model: str, num_layers: int = 1, num_single_layers: int = 1) -> Flux2Pipeline:
    """Returns a shipped pipeline whose transformer has few blocks and random weights."""
    pipeline = Flux2Pipeline.from_pretrained(model)
    config = pipeline.transformer.config
    config = dataclasses.replace(config, num_layers=num_layers, num_single_layers=num_single_layers)
    pipeline.transformer = Flux2Transformer(config, rngs=nnx.Rngs(0))
    return pipeline


def save_small_qwen3_vl(directory: Path) -> Path:
    """Saves the shipped controller with two blocks in each tower and random weights; returns the directory."""
    chat = Qwen3VLPipeline.from_pretrained(SHIPPED / "shapes-tiny" / "controller")
    sizes = chat.model.config
    text = dataclasses.replace(sizes.text, num_hidden_layers=2)
    vision = dataclasses.replace(sizes.vision, depth=2, deepstack_visual_indexes=(0,))
    model = Qwen3VL(dataclasses.replace(sizes, text=text, vision=vision), rngs=nnx.Rngs(0))
    Qwen3VLPipeline(model, chat.tokenizer, chat.image_processor).save_pretrained(directory)
    return directory
