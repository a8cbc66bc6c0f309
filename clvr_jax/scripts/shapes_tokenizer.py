"""The tokenizer of the small models: byte-level BPE over the language of the shapes world, with Qwen's special tokens.

python -m clvr_jax.scripts.shapes_tokenizer --out runs/shapes_tokenizer        a few seconds
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clvr_jax.arguments import run_script
from clvr_jax.data.preprocessing.text import train_tokenizer
from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.files.output_paths import check_directory

VOCABULARY = 640
"""Room for bytes, special tokens and about 350 merges; the language of the world needs fewer."""


def texts(seed: int, count: int) -> Iterator[str]:
    """Prompts and reasoning of simulated trajectories, and the words of the chat template."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        trajectory = simulate_trajectory(rng)
        yield trajectory.prompt
        yield from trajectory.replies
        yield "system\nuser\nassistant\n\n\n"


def main(out: Path = Path("runs/shapes_tokenizer")) -> None:
    """Trains the tokenizer.

    Args:
      out: Write the tokenizer to this directory.
    """
    train_tokenizer(texts(0, 2000), VOCABULARY, check_directory(out))


if __name__ == "__main__":
    run_script(main)
