"""Batches of the small FLUX.2 of the shapes world: functions of the step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from clvr_jax.data.preprocessing.text import encode_prompts
from clvr_jax.data.shapes import Example, continued_example, editing_example, generation_example, planned_example
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.tasks.shapes.sizes import SETTINGS

SIMPLE = {"single_object": 0.08, "two_object": 0.2, "counting": 0.2, "colors": 0.12, "position": 0.2, "color_attr": 0.2}
COMPLEX = {"complex": 1.0}


@dataclass(frozen=True)
class Kind:
    """A kind of batch: how often it is sampled, its size, and the function that makes one example."""

    share: float
    batch_size: int
    example: Callable[[np.random.Generator], Example]


BASE_KINDS = (
    Kind(0.27, 32, partial(generation_example, weights=SIMPLE)),
    Kind(0.17, 24, partial(generation_example, weights=COMPLEX)),
    Kind(0.30, 32, planned_example),
    Kind(0.18, 24, editing_example),
    Kind(0.08, 16, continued_example),
)


def batch(
    step: int, seed: int, tokenizer: Tokenizer, dropout: float, kinds: tuple[Kind, ...] = BASE_KINDS
) -> dict[str, np.ndarray]:
    """Returns the batch of a step: ids and mask (b, t); references (b, r, 64, 64, 3), target (b, 64, 64, 3), uint8."""
    rng = np.random.default_rng((seed, step))
    chosen = examples(rng, kinds)
    return collate(chosen, tokenizer, rng.random(len(chosen)) < dropout)


def examples(rng: np.random.Generator, kinds: tuple[Kind, ...]) -> list[Example]:
    """Returns the examples of a batch, all of one kind."""
    shares = np.array([kind.share for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    return [kind.example(rng) for _ in range(kind.batch_size)]


def collate(examples: list[Example], tokenizer: Tokenizer, dropped: np.ndarray) -> dict[str, np.ndarray]:
    """Makes a batch of examples with equally many references; the texts that are `dropped` become the empty one.

    Unlike the pipeline and `GenerationExamples`, which pad every text to its own bucket, all are padded to the bucket
    of the longest: batches of these recipes are not sorted by length, and the model learns to read texts in any bucket.
    """
    texts = ["" if drop else example.text for example, drop in zip(examples, dropped, strict=True)]
    ids, mask = encode_prompts(tokenizer, texts, SETTINGS.text_buckets)
    references = np.stack([np.reshape(example.references, (-1, 64, 64, 3)) for example in examples]).astype(np.uint8)
    return {"ids": ids, "mask": mask, "references": references, "target": np.stack([e.target for e in examples])}
