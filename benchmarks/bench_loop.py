"""The closed loop over 16 prompts together beside one after another, and what stands in the way of more.

python benchmarks/bench_loop.py
"""

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


if __name__ == "__main__":
    main()
