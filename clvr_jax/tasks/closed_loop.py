"""The programs of a closed loop for the planner: functions, shapes, and numbers of calls and FLOPs."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.cost_model.flops import (
    Flops,
    decoder_flops,
    flux2_flops,
    qwen3_flops,
    qwen3_vl_flops,
    reference_cache_flops,
    token_passes,
)
from clvr_jax.cost_model.flops_images import decoder_flops as image_decoder_flops
from clvr_jax.cost_model.flops_images import encoder_flops
from clvr_jax.data.preprocessing.text import bucket_for
from clvr_jax.diffusion.schedule import flow_sigmas
from clvr_jax.errors import UsageError
from clvr_jax.models.common.decoding import CACHE_BUCKET
from clvr_jax.models.flux2 import Flux2TransformerConfig, ReferenceCache
from clvr_jax.models.flux2.reference_cache import KeyValue, QuantizedKeyValue
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.models.qwen3_vl.image_buckets import TOKENS, BucketedImages, bucket_of, image_slots, patch_bucket
from clvr_jax.models.qwen3_vl.model import DecodeCache
from clvr_jax.models.qwen3_vl.positions import Grids
from clvr_jax.pipelines.flux2.programs import cache_references, decode, denoise, encode_images, encode_text
from clvr_jax.pipelines.flux2.settings import ReferenceMode
from clvr_jax.sharding import replicate, with_logical_constraint
from clvr_jax.tasks.bundles import ModelBundle
from clvr_jax.tasks.flux2.models import Flux2Models
from clvr_jax.tasks.qwen3_vl import PRESETS
from clvr_jax.training.plan import Program
from clvr_jax.trees import Params

_SHAPE = jax.ShapeDtypeStruct
Config = TypeVar("Config")
Weights = Mapping[str, Params]
Arrays = Mapping[str, PyTree]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Configuration of a closed loop.

    preset, controller: names of the models in `KLEIN`, and in `PRESETS` of Qwen3-VL. dtype: dtype of weights and
    computation. quantize: format of the weights of transformer, text encoder and controller, None for `dtype`.
    generations: number of images, generated one after the other. size: height and width of an image in pixels. steps:
    number of sampler steps. batch: number of loops that run together. prompt_tokens, reply_tokens, verification_tokens:
    numbers of tokens of the prompt, of a reply of the controller, and of a reply of the verifier, which reads one image
    at a time. reference_cache: how references are attended to; with "loop", the caches of all references are in memory
    during the whole loop. reference_cache_dtype: format of the caches, None for `dtype`.
    """

    preset: str
    controller: str
    dtype: str = "bfloat16"
    quantize: Literal["int8"] | None = None
    generations: int = 3
    size: int = 1024
    steps: int = 4
    batch: int = 1
    prompt_tokens: int = 192
    reply_tokens: int = 192
    verification_tokens: int = 96
    reference_cache: ReferenceMode = "none"
    reference_cache_dtype: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        counts = (self.generations, self.steps, self.batch, self.prompt_tokens, self.reply_tokens)
        if min(counts) < 1 or self.verification_tokens < 0:
            raise UsageError("closed loop: all counts must be at least 1, and verification_tokens at least 0")
        if self.size < 64 or self.size % 32:
            raise UsageError(f"closed loop: size must be a multiple of 32 pixels and at least 64, got {self.size}")
        if self.reference_cache_dtype and self.reference_cache == "none":
            raise UsageError(
                f"closed loop: --reference-cache-dtype {self.reference_cache_dtype} needs --reference-cache image or "
                "loop"
            )


def loop_programs(loop: LoopConfig, stages: str = "") -> list[Program]:
    """Returns the programs of a loop, those of the image generator first; each has only the weights that it reads.

    Args:
      loop: configuration of the loop.
      stages: regular expression; only programs whose name contains a match are returned.
    Raises: UsageError if no name contains a match, or if it is no regular expression.
    """
    try:
        pattern = re.compile(stages)
    except re.error as error:
        raise UsageError(f"closed loop: --stages {stages!r} is no regular expression ({error})") from error
    programs = [*_generation_programs(loop), *_controller_programs(loop)]
    selected = [program for program in programs if pattern.search(program.name)]
    if not selected:
        names = ", ".join(program.name for program in programs)
        raise UsageError(f"closed loop: --stages {stages!r} matches no stage; the stages are {names}")
    return selected


def _generation_programs(loop: LoopConfig) -> list[Program]:
    models = Flux2Models.abstract(loop.preset, loop.dtype, loop.quantize)
    transformer, text_encoder, vae, settings = models.transformer, models.text_encoder, models.vae, models.settings
    transformer_config, text_encoder_config, vae_config = transformer.config, text_encoder.config, vae.config
    layers, dtype, b, side = settings.text_encoder_out_layers, jnp.dtype(loop.dtype), loop.batch, loop.size
    grid = (side // vae_config.token_pixels, side // vae_config.token_pixels)
    image = grid[0] * grid[1]
    buckets = [
        bucket_for(min(loop.prompt_tokens + (number + 1) * loop.reply_tokens, max(settings.text_buckets)),
                   settings.text_buckets)
        for number in range(loop.generations)
    ]  # fmt: skip

    def read(weights: Weights, data: Arrays) -> jax.Array:
        return encode_text(text_encoder.graphdef, weights["text_encoder"], data["ids"], data["mask"], layers)

    def encode(weights: Weights, data: Arrays) -> jax.Array:
        return encode_images(vae.graphdef, replicate(weights["vae"]), data["image"])

    def to_image(weights: Weights, data: Arrays) -> jax.Array:
        return decode(vae.graphdef, replicate(weights["vae"]), data["latents"])

    def generate(references: int) -> Callable[[Weights, Arrays], jax.Array]:
        def run(weights: Weights, data: Arrays) -> jax.Array:
            return denoise(
                transformer.graphdef,
                weights["transformer"],
                data["noise"],
                data["text"],
                data["cached"] or data["references"],
                jnp.asarray(flow_sigmas(loop.steps, image)),
                jnp.float32(settings.guidance_scale),
                grid,
                (grid,) * references,
            )

        return run

    def cache(number: int, first: int) -> Callable[[Weights, Arrays], ReferenceCache]:
        def run(weights: Weights, data: Arrays) -> ReferenceCache:
            return cache_references(
                transformer.graphdef,
                weights["transformer"],
                data["references"],
                (grid,) * number,
                first,
                data["cached"],
                loop.reference_cache_dtype == "int8",
            )

        return run

    def caches(numbers: list[int]) -> tuple[ReferenceCache, ...]:
        held = (transformer_config, b, dtype, loop.reference_cache_dtype == "int8")
        return tuple(_abstract_cache(*held, number * image) for number in numbers)

    programs = []
    for text in sorted(set(buckets)):
        programs.append(
            Program(
                name=f"encode text of {text} tokens",
                function=read,
                weights={"text_encoder": text_encoder.weights},
                data={name: _SHAPE((b, text), jnp.int32) for name in ("ids", "mask")},
                reads={"text_encoder": 1},
                flops=qwen3_flops(text_encoder_config, b, text, layers=max(layers), logits=0).forward,
                calls=buckets.count(text),
            )
        )
    if loop.generations > 1:
        programs.append(
            Program(
                name="encode one reference",
                function=encode,
                weights={"vae": vae.weights},
                data={"image": _SHAPE((b, side, side, 3), dtype)},
                reads={"vae": 1},
                flops=encoder_flops(vae_config, b, side, side).forward,
                calls=sum(range(loop.generations)),
                is_replicated=True,
            )
        )
    for references, text in enumerate(buckets):
        is_kept = loop.reference_cache == "loop"
        cached = 0 if loop.reference_cache == "none" else references
        if cached:
            # With "loop", the caches of all references but the last exist already.
            number, earlier = (1, references - 1) if is_kept else (references, 0)
            programs.append(
                Program(
                    name=f"cache reference {references}" if is_kept else f"cache {references} references",
                    function=cache(number, earlier),
                    weights={"transformer": transformer.weights},
                    data={
                        "references": _SHAPE((b, number * image, vae_config.token_channels), dtype),
                        "cached": caches([1] * earlier),
                    },
                    reads={"transformer": 1},
                    flops=reference_cache_flops(
                        transformer_config, b, references=number * image, earlier=earlier * image
                    ).forward,
                    rows=b,
                    logical_axes=_REFERENCE_AXES,
                    other_bytes=_size(caches([1] * earlier)),
                    kept="cached" if is_kept else "",
                )
            )
        tokens = (references - cached) * image
        evaluation = flux2_flops(
            transformer_config, b, text=text, image=image, references=tokens, cached=cached * image
        )
        held = caches([1] * cached if is_kept else [cached] if cached else [])
        programs.append(
            Program(
                name=f"denoise with {references} references",
                function=generate(references),
                weights={"transformer": transformer.weights},
                data={
                    "noise": _SHAPE((b, image, transformer_config.in_channels), dtype),
                    "text": _SHAPE((b, text, transformer_config.joint_attention_dim), dtype),
                    "references": _SHAPE((b, tokens, vae_config.token_channels), dtype),
                    "cached": held,
                },
                reads={"transformer": loop.steps},
                flops=loop.steps * evaluation.forward,
                rows=b,
                logical_axes=_REFERENCE_AXES,
                other_bytes=loop.steps * _size(held),
                kept="cached" if is_kept else "",
                token_passes=b
                * token_passes(loop.reference_cache, steps=loop.steps, text=text, image=image, references=references),
            )
        )
    programs.append(
        Program(
            name="decode image",
            function=to_image,
            weights={"vae": vae.weights},
            data={"latents": _SHAPE((b, *grid, vae_config.token_channels), dtype)},
            reads={"vae": 1},
            flops=image_decoder_flops(vae_config, b, side, side).forward,
            calls=loop.generations,
            is_replicated=True,
        )
    )
    return programs


_REFERENCE_AXES = {5: (None, "batch", None, "heads", None), 4: (None, "batch", "heads", None)}
"""Logical axes of the keys and values of references (layer, row, token, head, head dimension), and of their scales."""


def _abstract_cache(
    config: Flux2TransformerConfig, rows: int, dtype: jnp.dtype, is_quantized: bool, tokens: int
) -> ReferenceCache:
    """Returns the shapes of a cache of references."""
    heads, channels = config.num_attention_heads, config.attention_head_dim
    stored: list[Any] = []
    for depth in (config.num_layers, config.num_single_layers):
        shape: Any = _SHAPE((depth, rows, tokens, heads, channels), jnp.int8 if is_quantized else dtype)
        scale: Any = _SHAPE((depth, rows, heads, tokens), jnp.float32)
        stored.append(QuantizedKeyValue(shape, shape, scale, scale) if is_quantized else KeyValue(shape, shape))
    return ReferenceCache(*stored)


def _size(tree: PyTree) -> float:
    """Returns the bytes of arrays, or of their shapes."""
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def _controller_programs(loop: LoopConfig) -> list[Program]:
    config = PRESETS[loop.controller]
    model = ModelBundle.abstract(QWEN3_VL, config, loop.dtype, loop.quantize)
    replies = [
        (number, loop.prompt_tokens + number * loop.reply_tokens, loop.reply_tokens)
        for number in range(loop.generations)
    ]
    programs = [
        _prefill(model, loop, f"controller prefill with {images} images", images, text, new_tokens)
        for images, text, new_tokens in replies
    ]
    longest = [_cache_length(config, loop, images, text, new_tokens) for images, text, new_tokens in replies]
    programs += [_decode(model, loop, "controller decode step", max(longest), loop.generations * loop.reply_tokens)]
    if new_tokens := loop.verification_tokens:
        read = _prefill(model, loop, "verifier prefill with 1 image", 1, 2 * loop.prompt_tokens, new_tokens)
        cache = _cache_length(config, loop, 1, 2 * loop.prompt_tokens, new_tokens)
        token = _decode(model, loop, "verifier decode step", cache, loop.generations * new_tokens)
        programs += [dataclasses.replace(read, calls=loop.generations), token]
    return programs


def _grids(config: Qwen3VLConfig, loop: LoopConfig, images: int) -> Grids:
    """Returns the grids of the images of one conversation, padding included."""
    patches = loop.size // config.vision.patch_size
    return ((1, patches, patches),) * image_slots(images, 1)


def _tokens(config: Qwen3VLConfig, loop: LoopConfig, images: int, text: int) -> int:
    """Returns the number of tokens of a conversation, padding included."""
    patches = loop.size // config.vision.patch_size
    length = text + images * (patches // config.vision.spatial_merge_size) ** 2
    return bucket_of(length, TOKENS)


def _cache_length(config: Qwen3VLConfig, loop: LoopConfig, images: int, text: int, new_tokens: int) -> int:
    return -(-(_tokens(config, loop, images, text) + new_tokens) // CACHE_BUCKET) * CACHE_BUCKET


def _prefill(
    model: ModelBundle[Qwen3VLConfig], loop: LoopConfig, name: str, images: int, text: int, new_tokens: int
) -> Program:
    """Returns the program that computes the cache of a conversation with `images` images."""
    config, b = model.config, loop.batch
    grids, tokens = _grids(config, loop, images), _tokens(config, loop, images, text)
    cache_length = _cache_length(config, loop, images, text, new_tokens)

    def prefill(weights: Weights, data: Arrays) -> tuple[jax.Array, DecodeCache]:
        module = nnx.merge(model.graphdef, weights["controller"])
        logits, cache = module.prefill(
            data["ids"],
            data.get("images"),
            (),
            data["positions"].swapaxes(0, 1),
            data["mask"],
            cache_length=cache_length,
        )
        return logits, _sharded(cache)

    data: dict[str, PyTree] = {
        "ids": _SHAPE((b, tokens), jnp.int32),
        "mask": _SHAPE((b, tokens), jnp.bool_),
        "positions": _SHAPE((b, 3, tokens), jnp.int32),
    }
    if grids:
        number, patches = b * len(grids), patch_bucket(grids, config.vision.spatial_merge_size)
        pixels = _SHAPE((number, patches, config.vision.patch_features), jnp.float32)
        places = _SHAPE((number,), jnp.int32)
        arrays: PyTree = ((pixels,), (_SHAPE((number, 3), jnp.int32),), places, places)
        data["images"] = BucketedImages(*arrays)
    return Program(
        name=name,
        function=prefill,
        weights={"controller": model.weights},
        data=data,
        reads={"controller": 1},
        flops=qwen3_vl_flops(config, b, tokens, grids, logits=1).forward,
        rows=b,
    )


def _decode(model: ModelBundle[Qwen3VLConfig], loop: LoopConfig, name: str, cache_length: int, calls: int) -> Program:
    """Returns the program of one decode step; the pipeline runs it in a loop on the device."""
    config, b = model.config.text, loop.batch
    dtype = jnp.dtype(loop.dtype)
    past = _SHAPE((config.num_hidden_layers, b, config.num_key_value_heads, cache_length, config.head_dim), dtype)
    seen, position = _SHAPE((b, cache_length), jnp.bool_), _SHAPE((b,), jnp.int32)
    cache: PyTree = (past, past, seen, _SHAPE((), jnp.int32), position)

    def decode_step(weights: Weights, data: Arrays) -> tuple[jax.Array, DecodeCache]:
        module = nnx.merge(model.graphdef, weights["controller"])
        logits, cache = module.decode_step(data["cache"], data["token"])
        return jnp.argmax(logits, axis=-1), _sharded(cache)

    flops = decoder_flops(config, config.num_hidden_layers, b, 1, cache_length)
    head = Flops(outside=2.0 * b * config.hidden_size * config.vocab_size)
    return Program(
        name=name,
        function=decode_step,
        weights={"controller": model.weights},
        data={
            "token": _SHAPE((b,), jnp.int32),
            "cache": DecodeCache(*cache),
        },
        reads={"controller": 1},
        flops=(flops + head).forward,
        calls=calls,
        rows=b,
        logical_axes={5: _CACHE_AXES},
        other_bytes=2.0 * past.size * dtype.itemsize,
        donates=True,
    )


_CACHE_AXES = (None, "batch", "heads", None, None)
"""Logical axes of the keys and values of a cache: layer, row, head, position, head dimension."""


def _sharded(cache: DecodeCache) -> DecodeCache:
    key, value = (with_logical_constraint(past, *_CACHE_AXES) for past in (cache.key, cache.value))
    return cache._replace(key=key, value=value)
