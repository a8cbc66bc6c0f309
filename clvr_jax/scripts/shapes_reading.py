"""How well a verifier of the shapes world tells clear objects from unclear ones, at every probability it may require.

`clvr eval verifier` counts images; this program counts single objects, so that few images are enough to compare models
and to choose the least probability of a clause (`ModelVerifier(clause_threshold=...)`). The images are those of loops
with the oracle as controller, on own prompts: half of the loops on prompts of the kinds that are trained on, half on
prompts with held-out pairs, none of them an evaluation prompt.

Then the same objects are given other colors, with all their imperfections. If held-out pairs are doubted less so, it is
the pair that is doubted, not how its objects are drawn.

    python -m clvr_jax.scripts.shapes_reading --model shapes-tiny --images runs/shapes_reading.npz
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clvr_jax.arguments import run_script
from clvr_jax.compilation import enable_compilation_cache
from clvr_jax.data.shapes_distractors import recolor_objects
from clvr_jax.display.tables import Table
from clvr_jax.errors import UsageError
from clvr_jax.files.image_io import read_image_arrays
from clvr_jax.files.output_paths import check_file
from clvr_jax.interfaces import ChatRequest, ChatResponse
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.qwen3_vl.verifier import MAX_TRAINED_TOKENS, PipelineModel, load_controller
from clvr_jax.reasoning.verification.evidence import least_clause_probability
from clvr_jax.reasoning.verification.verification import description_messages
from clvr_jax.scripts.shapes_images import images_in_the_loop, training_prompt, write_images
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading, detect
from clvr_jax.worlds.shapes.language.grammar import TIERS, sample_metadata
from clvr_jax.worlds.shapes.metadata import Metadata, has_held_out_pair
from clvr_jax.worlds.shapes.prompts import is_reserved
from clvr_jax.worlds.shapes.scene import HELD_OUT_PAIRS

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
FALSE_REJECTS = (0.01, 0.02, 0.03, 0.05)
_DOUBT = 0.5
_DRAWS = 4
"""How often the objects of an image are given other colors: some keep theirs, see `recolor_objects`."""


class ReadObject(NamedTuple):
    """An object as the detector and the verifier read it.

    is_clear: whether it is clear. is_held_out: whether it is a clear object of a held-out pair. probability: that of
    the clause that describes it as a clear object, as it is if it is clear; 0 if no clause does.
    """

    is_clear: bool
    is_held_out: bool
    probability: float


def main(
    model: str = "shapes-tiny",
    images: Path = Path("runs/shapes_reading.npz"),
    generator: str = "shapes-tiny",
    loops: int = 128,
    seed: int = 777,
) -> None:
    """Describes images and prints which objects a verifier would accept at every threshold.

    Args:
      model: Verifier: a shipped name, a directory with controller/, or a Qwen3-VL directory.
      images: Images, which are generated and written if the file does not exist.
      generator: Model that generates them, a shipped name or a pipeline directory.
      loops: Number of loops for each of the two sets of images.
      seed: The same seed gives the same prompts and noise.
    """
    if loops < 1:
        raise UsageError(f"--loops {loops}: at least one")
    check_file(images)
    enable_compilation_cache()
    if not images.exists():
        pipeline = Flux2Pipeline.from_pretrained(generator)
        prompts = {"other": training_prompt, "held_out": held_out_prompt}
        sets = {
            name: np.stack(images_in_the_loop(pipeline, None, loops, seed + number, sample))
            for number, (name, sample) in enumerate(prompts.items())
        }
        write_images(images, sets)
    chat = PipelineModel(load_controller(model, "float32"), model)
    for name, pixels in sorted(read_image_arrays(images).items()):
        request = [
            ChatRequest(description_messages(None), [image], MAX_TRAINED_TOKENS, top_logprobs=5) for image in pixels
        ]
        responses = chat.chat_all(request)
        readings = [detect(image) for image in pixels]
        print(f"{name.replace('_', '-')}: {len(pixels)} images\n")
        print("\n".join(summary(_read_all(readings, responses)).markdown()), end="\n\n")
        rng = np.random.default_rng(seed)
        drawn = [
            recolor_objects(image, reading, rng)[0]
            for image, reading in zip(pixels, readings, strict=True)
            for _ in range(_DRAWS)
        ]
        repeated = [each for each in request for _ in range(_DRAWS)]
        answers = chat.chat_all([replace(each, images=[image]) for each, image in zip(repeated, drawn, strict=True)])
        found = [(detect(image), answer) for image, answer in zip(drawn, answers, strict=True)]
        groups = [found[first : first + _DRAWS] for first in range(0, len(found), _DRAWS)]
        print(f"{recolored_summary(readings, responses, groups)}\n")
        # A verifier that looks must fail on these: what it says is of another image.
        control = _read_all(readings, [*responses[1:], *responses[:1]])
        rejected = np.array([item.probability == 0 for item in control if item.is_clear])
        print(f"Control, descriptions of other images: clear objects rejected {_share(rejected)}.\n")


def _read_all(readings: Sequence[Reading], descriptions: Sequence[ChatResponse]) -> list[ReadObject]:
    pairs = zip(readings, descriptions, strict=True)
    return [item for reading, description in pairs for item in read_objects(reading, description)]


def held_out_prompt(rng: np.random.Generator) -> Metadata:
    """Samples a prompt with a held-out pair that is no evaluation prompt."""
    while True:
        metadata = sample_metadata(rng, "complex", int(rng.choice(TIERS)), allow_held_out=True)
        if has_held_out_pair(metadata) and not is_reserved(metadata):
            return metadata


def read_objects(reading: Reading, description: ChatResponse) -> list[ReadObject]:
    """Returns the objects of an image, with the probabilities of their clauses in its description."""
    clauses = description.text.strip().removeprefix("I see ").rstrip(".").split("; ")
    found = []
    for item in reading.objects:
        is_held_out = (item.color, item.shape) in HELD_OUT_PAIRS
        is_read = str(item) in clauses
        found.append(
            ReadObject(True, is_held_out, least_clause_probability(description, str(item)) if is_read else 0.0)
        )
    for cell in reading.unclear:
        clear = [clause for clause in clauses if _is_clear_object_in(clause, cell)]
        found.append(ReadObject(False, False, least_clause_probability(description, clear[0]) if clear else 0.0))
    return found


def recolored_summary(
    readings: Sequence[Reading],
    descriptions: Sequence[ChatResponse],
    recolored: Sequence[Sequence[tuple[Reading, ChatResponse]]],
) -> str:
    """Says how many of the clear objects are doubted as they are, and in another color.

    Args:
      readings, descriptions: of the images.
      recolored: the same of each image in other colors, several times; an object is compared with itself in the first
        of them that gives it another color, and is left out if none does.
    """
    probabilities: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for reading, description, others in zip(readings, descriptions, recolored, strict=True):
        again = [_by_cell(other, answer) for other, answer in others]
        for cell, (item, read) in _by_cell(reading, description).items():
            found = (each[cell] for each in again if cell in each)
            changed = (
                one.probability for other, one in found if other.color != item.color and other.shape == item.shape
            )
            if (now := next(changed, None)) is not None:
                probabilities[read.is_held_out].append((read.probability, now))
    texts = []
    for is_held_out, name in ((True, "held-out pairs"), (False, "other pairs")):
        pairs = np.array(probabilities[is_held_out]).reshape(-1, 2)
        before, after = (pairs < _DOUBT).T
        if len(pairs):
            only = f"{np.sum(before & ~after)} only before, {np.sum(after & ~before)} only then"
            means = " and ".join(f"{mean:.3f}" for mean in pairs.mean(0))
            texts.append(f"{name} {_share(before)}, then {_share(after)} ({only}; mean probabilities {means})")
    return f"The same objects in another color, probability below {_DOUBT}: {'; '.join(texts) or 'none'}."


def _by_cell(reading: Reading, description: ChatResponse) -> dict[str, tuple[DetectedObject, ReadObject]]:
    """Returns cell -> its clear object, and how the description reads it."""
    clear = read_objects(reading, description)[: len(reading.objects)]
    return {item.cell: (item, read) for item, read in zip(reading.objects, clear, strict=True)}


def _is_clear_object_in(clause: str, cell: str) -> bool:
    return clause.endswith(f" {cell}") and len(clause.split()) == 2 + len(cell.split()) and "unclear" not in clause


def summary(objects: Sequence[ReadObject]) -> Table:
    """Returns the table: by threshold, then at those thresholds at which equal shares of clear objects are rejected."""
    unclear, other, held_out = (
        np.array([item.probability for item in objects if (item.is_clear, item.is_held_out) == kind])
        for kind in ((False, False), (True, False), (True, True))
    )

    def row(threshold: float) -> list[str]:
        limit = max(threshold, 1e-9)  # a clause that is missing has probability 0
        shares = (_share(unclear >= limit), _share(other < limit), _share(held_out < limit))
        return [f"{threshold:.3f}", *shares]

    titles = ["least probability", "unclear accepted", "other pairs rejected", "held-out pairs rejected"]
    # The same thresholds for every model, then those at which models reject equally many clear objects.
    equal = [float(np.quantile(other, share)) for share in FALSE_REJECTS] if len(other) else []
    return Table(titles, [[row(threshold) for threshold in each] for each in (THRESHOLDS, equal) if each])


def _share(chosen: np.ndarray) -> str:
    return f"{chosen.mean():.3f} of {len(chosen)}" if len(chosen) else ""


if __name__ == "__main__":
    run_script(main)
