"""Conversations of the loop with and without a prefix cache: equal replies, and the time to process the fifth prompt.

python benchmarks/bench_prefix_cache.py

Each conversation has five rounds. The controller replies in both ways, and its reply, another image and a report on it
make the next prompt, as in the loop. A prompt is timed from messages to its first token, for one conversation and for
sixteen in a call. --width 1024 measures a random model of about 100 million parameters with the same tokens.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np
from contest import folder_of
from flax import nnx

from clvr_jax.data.shapes import ShapesTrajectory, simulate_trajectory
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.reasoning.conversation.context import chat_messages
from clvr_jax.reasoning.verification.verification import report
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.requirements import describe

ROUNDS, NEW_TOKENS, BATCH = 5, 96, 16
GIB = 0.25


class Conversations:
    """Conversations that grow by rounds in step. The images are those of a simulated trajectory, in turns."""

    def __init__(self, sources: Sequence[ShapesTrajectory]):
        self._sources = sources
        self._replies: list[list[str]] = [[] for _ in sources]

    def arguments(self) -> tuple[list, list]:
        """Returns the messages and images of the next prompts."""
        messages, images = [], []
        for source, replies in zip(self._sources, self._replies, strict=True):
            own = [source.canvases[number % len(source.canvases)] for number in range(len(replies))]
            found = report(describe(detect(own[-1])), [source.prompt.split(",")[0]]) if own else ""
            messages.append(chat_messages(source.prompt, replies, len(own), None, found))
            images.append(own)
        return messages, images

    def extend(self, replies: Sequence[str]) -> None:
        """Adds a reply to each conversation."""
        for own, reply in zip(self._replies, replies, strict=True):
            own.append(reply)


def main() -> None:
    """Prints equal replies, and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-tiny", help="shipped name or directory")
    parser.add_argument("--conversations", type=int, default=1000, help="whose replies are compared, 16 in a call")
    parser.add_argument("--repetitions", type=int, default=8, help="of each timed prompt, with new conversations")
    parser.add_argument("--width", type=int, help="time a random model of this width with 8 layers")
    options = parser.parse_args()
    plain = Qwen3VLPipeline.from_pretrained(folder_of(options.model) / "controller")
    if options.width:
        plain.model = random_model(plain.model, options.width)
    cached = Qwen3VLPipeline(plain.model, plain.tokenizer, plain.image_processor, plain.generation, GIB)
    rng = np.random.default_rng(0)
    if options.conversations and not options.width:
        compare(plain, cached, rng, options.conversations)
    for size in (1, BATCH):
        times(plain, cached, rng, size, options.repetitions)


def compare(plain: Qwen3VLPipeline, cached: Qwen3VLPipeline, rng: np.random.Generator, count: int) -> None:
    """Compares all replies."""
    equal = total = 0
    for begin in range(0, count, BATCH):
        conversations = Conversations(sources(rng, min(BATCH, count - begin)))
        for _ in range(ROUNDS):
            expected = plain.answer_all(*conversations.arguments(), NEW_TOKENS)
            found = cached.answer_all(*conversations.arguments(), NEW_TOKENS)
            equal += sum(one == other for one, other in zip(found, expected, strict=True))
            total += len(expected)
            conversations.extend([answer.text for answer in expected])
    prefixes = cached._prefixes
    assert prefixes is not None
    print(
        f"{count} conversations of {ROUNDS} rounds: {equal} of {total} replies are equal; "
        f"{1 - prefixes.computed_tokens / prefixes.prompt_tokens:.0%} of the tokens of all prompts were not computed",
        flush=True,
    )


def times(
    plain: Qwen3VLPipeline, cached: Qwen3VLPipeline, rng: np.random.Generator, size: int, repetitions: int
) -> None:
    """Times the prompt of the last round, in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    tokens = []
    for repetition in range(repetitions + 1):
        conversations = Conversations(sources(rng, size))
        for _ in range(ROUNDS - 1):
            answers = cached.answer_all(*conversations.arguments(), NEW_TOKENS)
            conversations.extend([answer.text for answer in answers])
        for pipeline, own in zip((plain, cached), seconds, strict=True):
            began = time.perf_counter()
            answers = pipeline.answer_all(*conversations.arguments(), 1)
            if repetition:  # the first one compiles
                own.append(time.perf_counter() - began)
        tokens += [answer.input_tokens for answer in answers]
    without, with_cache = (statistics.median(own) * 1e3 for own in seconds)
    ratios = sorted(new / old for old, new in zip(*seconds, strict=True))
    print(
        f"round {ROUNDS}, {size} conversations of {statistics.mean(tokens):.0f} tokens: {without:.1f} ms without, "
        f"{with_cache:.1f} ms with a prefix cache; ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}), target 0.35",
        flush=True,
    )


def sources(rng: np.random.Generator, count: int) -> list[ShapesTrajectory]:
    """Returns simulated trajectories with images."""
    found: list[ShapesTrajectory] = []
    while len(found) < count:
        source = simulate_trajectory(rng)
        if source.canvases:
            found.append(source)
    return found


def random_model(model: Qwen3VL, width: int) -> Qwen3VL:
    """Returns a model with the tokens of `model`, and random weights."""
    config = model.config
    text = dataclasses.replace(
        config.text,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=8,
        num_attention_heads=width // config.text.head_dim,
        num_key_value_heads=max(width // config.text.head_dim // 4, 1),
    )
    vision = dataclasses.replace(config.vision, out_hidden_size=width)
    return Qwen3VL(dataclasses.replace(config, text=text, vision=vision), rngs=nnx.Rngs(0))


if __name__ == "__main__":
    main()
