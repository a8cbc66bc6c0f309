"""Images of the generators themselves, which the verifier of the shapes world learns to read.

The prompts are training prompts. Each generator is run one shot, from prompts alone or with the whole plan, and in the
loop with the oracle; the detector labels the images when they are read (`configs/shapes_controller.py`). Arrays that
the file already holds are kept, so that an interrupted run resumes.

    python -m clvr_jax.scripts.shapes_images --distilled runs/shapes_distill/export --out runs/shapes_images.npz
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from clvr_jax.arguments import run_script
from clvr_jax.compilation import enable_compilation_cache
from clvr_jax.display.console import progress
from clvr_jax.evaluation.systems.models import Oracle
from clvr_jax.files.atomic_io import write_atomically
from clvr_jax.files.image_io import pixels, read_image_arrays
from clvr_jax.files.output_paths import check_file
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.reasoning.conversation.actions import strip_action
from clvr_jax.reasoning.loop import loop
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.worlds.shapes.language.grammar import DENSE_TIERS, TIERS
from clvr_jax.worlds.shapes.layout import plan
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.oracle import first_reply
from clvr_jax.worlds.shapes.prompts import train_prompt

BATCH = 32
PLANNED_SHARE = 0.6
"""Share of one-shot images that are generated with the whole plan; the others have the prompt alone."""


Maker = Callable[[Flux2Pipeline, int | None, int, int], list[np.ndarray]]
"""(pipeline, solver steps, number of images, seed) -> images."""


def main(
    out: Path = Path("runs/shapes_images.npz"),
    merged: str = "shapes-tiny",
    distilled: str = "runs/shapes_distill/export",
    sft: str = "shapes-tiny-sft",
    base: str = "shapes-tiny-base",
    count: int = 1024,
    steps: int = 10,
    seed: int = 1,
) -> None:
    """Generates the images and writes them as arrays (n, 64, 64, 3) uint8, one for each generator and mode.

    Args:
      out: Write the arrays to this file.
      merged: Merged model, a shipped name or a pipeline directory.
      distilled: Distilled model, a shipped name or a pipeline directory.
      sft: Fine-tuned model, a shipped name or a pipeline directory.
      base: Base model, a shipped name or a pipeline directory.
      count: Generate this many images with the distilled model, which errs most; the others generate fewer.
      steps: Number of sampler steps of the models that are not distilled. They are trained for more; the mistakes are
        of the same kinds.
      seed: The same seed gives the same prompts and noise.
    """
    check_file(out)
    enable_compilation_cache()
    arrays: dict[str, np.ndarray] = {}
    if out.exists():
        arrays = read_image_arrays(out)
    runs: dict[str, tuple[str, int | None, int, Maker]] = {
        "distilled_one_shot": (distilled, None, count, _one_shot),
        "merged_one_shot": (merged, None, count // 2, _one_shot),
        "base_one_shot": (base, steps, count // 4, _one_shot),
        "sft_one_shot": (sft, steps, count // 4, _one_shot),
        "merged_loop": (merged, None, count // 5, images_in_the_loop),
        "distilled_loop": (distilled, None, count // 8, images_in_the_loop),
    }
    with progress("shapes images", len(runs)) as advance:
        for number, (name, (model, sampler_steps, wanted, make)) in enumerate(runs.items(), start=1):
            if name not in arrays:
                pipeline = Flux2Pipeline.from_pretrained(model)
                arrays[name] = np.stack(make(pipeline, sampler_steps, wanted, seed + number))
                write_images(out, arrays)
            advance(number)


def _one_shot(pipeline: Flux2Pipeline, steps: int | None, count: int, seed: int) -> list[np.ndarray]:
    """Images of whole prompts, 3 to 9 objects."""
    rng = np.random.default_rng(seed)
    images: list[np.ndarray] = []
    while len(images) < count:
        texts = []
        for _ in range(BATCH):
            metadata = training_prompt(rng)
            reply = strip_action(first_reply(plan(metadata), limit=len(plan(metadata))))
            texts.append(f"{metadata['prompt']}\n{reply}" if rng.random() < PLANNED_SHARE else metadata["prompt"])
        seeds = [int(value) for value in rng.integers(2**31, size=BATCH)]
        made = pipeline.generate_each(texts, [[]] * BATCH, seeds, num_inference_steps=steps)
        images += [pixels(image) for image in made.images]
    return images[:count]


def images_in_the_loop(
    pipeline: Flux2Pipeline,
    steps: int | None,
    count: int,
    seed: int,
    sample: Callable[[np.random.Generator], Metadata] | None = None,
) -> list[np.ndarray]:
    """Returns all images of loops with the oracle as controller.

    Args:
      pipeline: generator.
      steps: number of sampler steps; the model's own if None.
      count: number of loops, rounded up to whole batches.
      seed: of the prompts and the noise.
      sample: samples a prompt; `training_prompt` if None.
    """
    sample = sample or training_prompt
    rng = np.random.default_rng(seed)
    images: list[np.ndarray] = []
    for _ in range(0, count, BATCH):
        metadata = list({entry["prompt"]: entry for entry in (sample(rng) for _ in range(BATCH))}.values())
        seeds = [int(value) for value in rng.integers(2**31, size=len(metadata))]
        budget = Budget(max_steps=7, max_rollbacks=0)
        generator = Flux2ImageGenerator(pipeline, steps)
        done = loop.run([entry["prompt"] for entry in metadata], Oracle(metadata), generator, budget, seeds)
        images += [pixels(step.image) for each in done for step in each.generated if step.image is not None]
    return images


def training_prompt(rng: np.random.Generator) -> Metadata:
    """Samples a training prompt, mostly with many objects."""
    return train_prompt(rng, {"complex": 0.8, "counting": 0.12, "two_object": 0.08}, TIERS + DENSE_TIERS)


def write_images(out: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of images to a compressed file of NumPy."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(out, buffer.getvalue())


if __name__ == "__main__":
    run_script(main)
