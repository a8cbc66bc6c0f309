"""Accuracy and memory of int8, for the models of shapes-tiny: greedy replies, images, caches, and bytes of the weights.

python benchmarks/int8_accuracy.py [--part caches]

`caches` compares images whose cached references are int8 with those of unquantized caches and, to tell what is much,
those of a computation in bfloat16 with the same ones.

Targets: at least .95 of the replies are identical, images differ by at most 2 of 255 on average, and the weights need
at most .55 of their memory in bfloat16. The script exits with 1 if a target is missed. A reply is identical if its text
is; the controller's conversations have 0 to 3 images.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.data.shapes import Example, editing_example, planned_example, simulate_trajectory
from clvr_jax.files.image_io import as_pil
from clvr_jax.models.common.quantization import Quantization, weight_bytes
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import resolve
from clvr_jax.reasoning.conversation.context import chat_messages

MODEL = "shapes-tiny"
MIN_IDENTICAL, MAX_DIFFERENCE, MAX_MEMORY = 0.95, 2.0, 0.55
MAX_IMAGES, MAX_REPLY_TOKENS = 3, 160

Conversations = dict[int, list[tuple[list[dict[str, object]], list[np.ndarray]]]]
"""Number of images -> conversations (messages, images)."""


def main() -> None:
    """Measures all three, and prints one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--images", type=int, default=32, help="half of them generated, half of them edited")
    parser.add_argument("--dtype", default="float32", help="of the computation, and of the weights that are not int8")
    parser.add_argument("--part", choices=("all", "memory", "replies", "images", "caches"), default="all")
    options = parser.parse_args()
    parts = {
        "memory": memory,
        "replies": lambda: replies(options.conversations, options.dtype),
        "images": lambda: images(options.images, options.dtype),
        "caches": lambda: caches(options.images),
    }
    sys.exit(0 if all([part() for name, part in parts.items() if options.part in ("all", name)]) else 1)


def memory() -> bool:
    """Compares the bytes of int8 and bfloat16 weights of each large model."""
    met = True
    for name in ("transformer", "text_encoder", "controller"):
        held = [_weight_bytes(name, quantize) for quantize in (None, "int8")]
        print(f"{name}: int8 weights need {held[1] / held[0]:.3f} of bfloat16 (at most {MAX_MEMORY})", flush=True)
        met &= held[1] <= MAX_MEMORY * held[0]
    return met


def _weight_bytes(name: str, quantize: Quantization | None) -> int:
    if name == "controller":
        path, _ = resolve(MODEL)
        return weight_bytes(
            nnx.state(Qwen3VLPipeline.from_pretrained(path / name, jnp.bfloat16, quantize=quantize).model)
        )
    return weight_bytes(nnx.state(getattr(Flux2Pipeline.from_pretrained(MODEL, jnp.bfloat16, quantize=quantize), name)))


def replies(count: int, dtype: str) -> bool:
    """Compares greedy replies of the controller with and without int8 weights."""
    began = time.perf_counter()
    conversations = make_conversations(count)
    plain, quantized = (greedy_replies(conversations, dtype, quantize) for quantize in (None, "int8"))
    identical = sum(one == other for one, other in zip(plain, quantized, strict=True))
    print(
        f"replies: {identical} of {count} greedy replies are identical (at least {MIN_IDENTICAL:.0%}); "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return identical >= MIN_IDENTICAL * count


def make_conversations(count: int) -> Conversations:
    """Makes conversations of the shapes world in which the controller's reply is due."""
    rng = np.random.default_rng(5)
    made: Conversations = {}
    for _ in range(count):
        trajectory = simulate_trajectory(rng)
        steps = int(rng.integers(0, min(len(trajectory.canvases), MAX_IMAGES) + 1))
        messages = chat_messages(trajectory.prompt, trajectory.replies[:steps], steps)
        made.setdefault(steps, []).append((messages, trajectory.canvases[:steps]))
    return made


def greedy_replies(conversations: Conversations, dtype: str, quantize: Quantization | None) -> list[str]:
    """Returns the controller's replies, in the order of the dictionary."""
    path, _ = resolve(MODEL)
    pipeline = Qwen3VLPipeline.from_pretrained(path / "controller", dtype, quantize=quantize)
    return [
        reply
        for rows in conversations.values()
        for reply in pipeline.chat_all(
            [messages for messages, _ in rows], [shown for _, shown in rows], MAX_REPLY_TOKENS
        )
    ]


def images(count: int, dtype: str) -> bool:
    """Compares images of the same seeds with and without int8 weights."""
    began = time.perf_counter()
    rng = np.random.default_rng(6)
    examples = [(editing_example if index % 2 else planned_example)(rng) for index in range(count)]
    plain, quantized = (generated(examples, dtype, quantize) for quantize in (None, "int8"))
    differences = [np.abs(one - other).mean() for one, other in zip(plain, quantized, strict=True)]
    print(
        f"images: {np.mean(differences):.2f} of 255 on average over {count} (at most {MAX_DIFFERENCE:.0f}), "
        f"{np.max(differences):.2f} for the most different; {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return bool(np.mean(differences) <= MAX_DIFFERENCE)


def caches(count: int) -> bool:
    """Compares images whose references are cached in int8 with those of caches in float32, for both ways to cache."""
    began, met = time.perf_counter(), True
    rng = np.random.default_rng(8)
    examples: list[Example] = []
    while len(examples) < count:
        trajectory = simulate_trajectory(rng)
        examples += [trajectory.example(2)] if len(trajectory.canvases) > 2 else []
    for mode in ("image", "loop"):
        options = {"reference_cache": mode}
        plain = generated(examples, "float32", None, **options)
        rounded = generated(examples, "bfloat16", None, **options)
        quantized = generated(examples, "float32", None, **options, reference_cache_dtype="int8")
        means = [
            np.mean([np.abs(one - other).mean() for one, other in zip(plain, found, strict=True)])
            for found in (quantized, rounded)
        ]
        print(
            f"caches, {mode}: {means[0]:.3f} of 255 on average over {count} (at most {MAX_DIFFERENCE:.0f}), "
            f"{means[1]:.3f} for a computation in bfloat16; {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        met &= bool(means[0] <= MAX_DIFFERENCE)
    return met


def generated(
    examples: Sequence[Example], dtype: str, quantize: Quantization | None, **options: Any
) -> list[np.ndarray]:
    """Returns one image for each example, float32 from 0 to 255; the seed is the index of the example."""
    output = Flux2Pipeline.from_pretrained(MODEL, dtype, quantize=quantize, **options).generate_each(
        [example.text for example in examples],
        [[as_pil(image) for image in example.references] for example in examples],
        list(range(len(examples))),
    )
    return [np.asarray(image, np.float32) for image in output.images]


if __name__ == "__main__":
    main()
