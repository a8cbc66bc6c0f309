"""Conversations of the loop with and without a prefix cache: equal replies, and the time to process the fifth prompt.

python benchmarks/bench_prefix_cache.py

Each conversation has five rounds. The controller replies in both ways, and its reply, another image and a report on it
make the next prompt, as in the loop. A prompt is timed from messages to its first token, for one conversation and for
sixteen in a call. --width 1024 measures a random model of about 100 million parameters with the same tokens, --side 256
images of 256 tokens instead of 16, which are to the text about as images of 1024 x 1024 are for a Qwen3-VL.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import numpy as np
from contest import folder_of
from flax import nnx

from clvr_jax.data.preprocessing.conversations import IMAGE_PAD
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
        """Adds a reply to each conversation, without placeholders of images, which a random model may write."""
        for own, reply in zip(self._replies, replies, strict=True):
            own.append(reply.replace(IMAGE_PAD, ""))


def main() -> None:
    """Prints equal replies, and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-tiny", help="shipped name or directory")
    parser.add_argument("--conversations", type=int, default=1000, help="whose replies are compared, 16 in a call")
    parser.add_argument("--repetitions", type=int, default=8, help="of each timed prompt")
    parser.add_argument("--width", type=int, help="time a random model of this width with 8 layers")
    parser.add_argument("--side", type=int, help="time images of this side in pixels, a token for 16 x 16 of them")
    options = parser.parse_args()
    plain = Qwen3VLPipeline.from_pretrained(folder_of(options.model) / "controller")
    if options.width:
        plain.model = random_model(plain.model, options.width)
    if options.side:
        pixels = options.side**2
        plain.image_processor = dataclasses.replace(plain.image_processor, min_pixels=pixels, max_pixels=pixels)
    cached = Qwen3VLPipeline(plain.model, plain.tokenizer, plain.image_processor, plain.generation, GIB)
    rng = np.random.default_rng(0)
    if options.conversations and not options.width and not options.side:
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
    """Times the prompt of the last round, in turns, by the clock and by the seconds of all cores."""
    conversations = Conversations(sources(rng, size))
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(conversations.arguments())
        conversations.extend([answer.text for answer in plain.answer_all(*rounds[-1], NEW_TOKENS)])
    *earlier, last = rounds
    figures: dict[Qwen3VLPipeline, list[tuple[float, float]]] = {plain: [], cached: []}
    assert cached._prefixes is not None
    for repetition in range(repetitions + 1):
        cached._prefixes.clear()
        for arguments in earlier:
            cached.answer_all(*arguments, NEW_TOKENS)
        for pipeline, own in figures.items():
            began, busy = time.perf_counter(), time.process_time()
            answers = pipeline.answer_all(*last, 1)
            if repetition:  # the first one compiles
                own.append((time.perf_counter() - began, time.process_time() - busy))
    tokens = statistics.mean(answer.input_tokens for answer in answers)
    print(f"prompt of round {ROUNDS}, {size} conversations of {tokens:.0f} tokens:")
    for which, name in enumerate(("clock", "all cores")):
        without, with_cache = ([each[which] for each in own] for own in figures.values())
        ratios = sorted(after / before for before, after in zip(without, with_cache, strict=True))
        old, new = (1e3 * statistics.median(own) for own in (without, with_cache))
        print(
            f"  {name:<10} {old:8.1f} ms without, {new:8.1f} ms with a prefix cache; ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), target 0.35",
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
