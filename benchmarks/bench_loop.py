"""The closed loop over 16 prompts together beside one after another, and what stands in the way of more.

python benchmarks/bench_loop.py
"""

import jax
import numpy as np
from contest import arguments, contest, show

from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.worlds.shapes.prompts import train_prompt

COUNT = 16
TARGET = 3.0


def loop(name: str, pipeline: ClosedLoopPipeline, prompts: list[str], seeds: list[int], rounds: int) -> None:
    """One line: the prompts in one call, and in one call each."""

    def together() -> list:
        return pipeline.run(prompts, seeds)

    def one_by_one() -> list:
        return [pipeline.run([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]

    show(name, contest(together, one_by_one, rounds), TARGET)


def matmul(pipeline: ClosedLoopPipeline, rounds: int) -> None:
    """One line: the widest product of the drawer over the tokens of 16 drawings, at once and in 16 parts.

    No batching can gain more than this where drawing is all matrix products: a part that keeps the processor busy alone
    leaves nothing to share.
    """
    config = pipeline.flux.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    wide = int(width * (3 + 2 * config.mlp_ratio))
    tokens = 2 * (max(pipeline.flux.settings.text_buckets[:3]) + 2 * 16)  # with guidance, one reference
    left, right = np.ones((COUNT * tokens, width), np.float32), np.ones((width, wide), np.float32)
    parts = [jax.device_put(part) for part in np.split(left, COUNT)]
    whole, weights = jax.device_put(left), jax.device_put(right)
    product = jax.jit(lambda x, w: x @ w)

    def at_once() -> None:
        for _ in range(100):
            product(whole, weights).block_until_ready()

    def in_parts() -> None:
        for _ in range(100):
            for part in parts:
                product(part, weights).block_until_ready()

    show(f"bound: ({tokens}, {width}) x ({width}, {wide}), {COUNT} at once", contest(at_once, in_parts, rounds), TARGET)


def main() -> None:
    """Training prompts, the shipped controller, the model's own number of steps."""
    options = arguments(__doc__)
    pipeline = ClosedLoopPipeline.from_pretrained(options.model)
    prompts = [train_prompt(np.random.default_rng((7, number)))["prompt"] for number in range(COUNT)]
    rounds = max(2, options.rounds // 2)
    print("closed loop: 16 prompts together beside one by one")
    loop(f"{options.model}, {COUNT} prompts", pipeline, prompts, list(range(COUNT)), rounds)
    # The same prompt and seed 16 times: all take the same way, nothing waits and nothing is drawn apart.
    middling = sorted(prompts, key=len)[COUNT // 2]
    loop(f"bound: {COUNT} times the same prompt", pipeline, [middling] * COUNT, [0] * COUNT, rounds)
    matmul(pipeline, options.rounds)


if __name__ == "__main__":
    main()
