"""How far the unchanged part of an image drifts over 8 edits, with references encoded again or with kept latents.

Each loop draws two objects, adds a third, and then replaces the third seven times. PSNR compares the cells that no edit
names with those of the first image. Both settings begin from the same noise, so that their first images are the same.
The last line says what 8 times encoding, decoding and rounding to 8 bits do to the first images, without the model.
The loops of a setting run together; the request of each step is that of a correct image.

python benchmarks/bench_drift.py [--loops 32] [--reference-cache none]
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.files.image_io import pixels
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.pipelines.flux2.programs import decode, encode_images
from clvr_jax.reasoning import GenerationRequest
from clvr_jax.worlds.shapes.detect import Reading, detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import IMAGE_GEN, Edit, apply_edits, edit_text, first_reply
from clvr_jax.worlds.shapes.scene import CELLS, cell_pixels, sample_pair

EDITS = 8
SETTINGS = ("encoded", "kept")


class Edited:
    """A loop: its prompt, the reply before each image, the object that is edited, and those that are not."""

    def __init__(self, seed: int):
        rng = np.random.default_rng((seed, 29))
        cells = [CELLS[index] for index in rng.choice(len(CELLS), 3, replace=False)]
        self.fixed = tuple(PlannedObject(*sample_pair(rng), cell) for cell in cells[:2])
        self.cell = cells[2]
        edited = [PlannedObject(*sample_pair(rng), self.cell)]
        while len(edited) < EDITS:
            one = PlannedObject(*sample_pair(rng), self.cell)
            if one != edited[-1]:
                edited.append(one)
        shown, plan = tuple(self.fixed), (*self.fixed, edited[0])
        self.prompt = ", ".join(f"a {item.color} {item.shape} at the {item.cell}" for item in plan)
        self.replies = [first_reply(plan)]
        for before, item in zip([None, *edited], edited, strict=False):
            edit = Edit("add" if before is None else "replace", self.cell, before, item)
            seen = "; ".join(map(str, sorted(shown, key=lambda each: CELLS.index(each.cell))))
            self.replies.append(f"I see {seen}. Unmet: {item}. {edit_text([edit])}{IMAGE_GEN}")
            shown = tuple(apply_edits(shown, [edit]))

    def psnr(self, image: np.ndarray, first: np.ndarray) -> float:
        """PSNR in dB of the cells that no edit names, against the first image."""
        kept = np.ones(image.shape[:2], bool)
        kept[cell_pixels(self.cell)] = False
        error = float(np.square(image[kept].astype(float) - first[kept].astype(float)).mean())
        return 10 * float(np.log10(255**2 / max(error, 1e-9)))

    def holds(self, reading: Reading) -> bool:
        """Whether the objects that no edit names are still there."""
        found = {(item.color, item.shape, item.cell) for item in reading.objects}
        return all((item.color, item.shape, item.cell) in found for item in self.fixed)


def images_of(pipeline: Flux2Pipeline, loops: Sequence[Edited]) -> list[list[np.ndarray]]:
    """The images of each loop."""
    generator, made = Flux2ImageGenerator(pipeline), [[] for _ in loops]
    for number in range(EDITS + 1):
        requests = [
            GenerationRequest(loop.prompt, tuple(loop.replies[: number + 1]), tuple(own), 1000 * seed + number)
            for seed, (loop, own) in enumerate(zip(loops, made, strict=True))
        ]
        for own, generated in zip(made, generator.generate(requests), strict=True):
            own.append(generated.image)
    return [[pixels(image) for image in own] for own in made]


def round_trips(pipeline: Flux2Pipeline, images: Sequence[np.ndarray]) -> list[list[float]]:
    """PSNR in dB of each image against itself, after 1 to `EDITS` times encoding, decoding and rounding to 8 bits."""
    graphdef, state = nnx.split(pipeline.vae)

    @jax.jit
    def once(state: Any, images: jax.Array) -> jax.Array:
        return jnp.round(decode(graphdef, state, encode_images(graphdef, state, images / 127.5 - 1)) * 255)

    first = current = np.stack(images).astype(np.float32)
    found = []
    for _ in range(EDITS):
        current = np.asarray(once(state, current))
        errors = np.square(current - first).mean(axis=(1, 2, 3))
        found.append((10 * np.log10(255**2 / np.maximum(errors, 1e-9))).tolist())
    return found


def main() -> None:
    """A line for each edit: quartiles of PSNR of both settings, and in how many loops kept latents are nearer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes-tiny")
    parser.add_argument("--loops", type=int, default=32)
    parser.add_argument("--reference-cache", choices=("none", "image", "loop"), help="the model's own if not given")
    options = parser.parse_args()
    loops = [Edited(seed) for seed in range(options.loops)]
    pipeline = Flux2Pipeline.from_pretrained(options.model, reference_cache=options.reference_cache)
    found: dict[str, list[list[np.ndarray]]] = {}
    for setting in SETTINGS:
        pipeline.choose_reference_latents(setting)
        found[setting] = images_of(pipeline, loops)
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(*found.values(), strict=True))
    print(
        f"{options.model}, {len(loops)} loops, reference_cache {pipeline.reference_cache}: PSNR to the first image, dB"
    )
    for number in range(1, EDITS + 1):
        columns = {
            setting: [loop.psnr(own[number], own[0]) for loop, own in zip(loops, images, strict=True)]
            for setting, images in found.items()
        }
        texts = []
        for setting, values in columns.items():
            low, middle, high = statistics.quantiles(values, n=4)
            held = sum(loop.holds(detect(own[number])) for loop, own in zip(loops, found[setting], strict=True))
            texts.append(f"{setting} {middle:5.2f} ({low:5.2f} to {high:5.2f}), objects hold in {held}")
        nearer = sum(kept > encoded for encoded, kept in zip(*columns.values(), strict=True))
        gains = [kept - encoded for encoded, kept in zip(*columns.values(), strict=True)]
        print(f"edit {number}: {'; '.join(texts)}; kept is nearer in {nearer}, by {statistics.median(gains):.2f} dB")
    trips = [statistics.median(values) for values in round_trips(pipeline, [own[0] for own in found["encoded"]])]
    print(f"without the model: {' '.join(f'{psnr:.2f}' for psnr in trips)}")


if __name__ == "__main__":
    main()
