"""The closed loop over 16 prompts together beside one after another.

python benchmarks/bench_loop.py
"""

import numpy as np
from contest import arguments, contest, show

from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.worlds.shapes.prompts import train_prompt

COUNT = 16


def main() -> None:
    """Training prompts, the shipped controller, the model's own number of steps."""
    options = arguments(__doc__)
    pipeline = ClosedLoopPipeline.from_pretrained(options.model)
    prompts = [train_prompt(np.random.default_rng((7, number)))["prompt"] for number in range(COUNT)]
    seeds = list(range(COUNT))

    def together() -> list:
        return pipeline.run(prompts, seeds)

    def one_by_one() -> list:
        return [pipeline.run([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]

    print("closed loop: 16 prompts together beside one by one")
    result = contest(together, one_by_one, max(2, options.rounds // 2))
    show(f"{options.model}, {COUNT} prompts", result, 3.0)


if __name__ == "__main__":
    main()
