"""What a benchmark measures: a model in one of its modes, as a function of prompts and seeds."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.drawn import DrawAll
from clvr_jax.evaluation.shapes import run, shapes_judge
from clvr_jax.outputs import check_folder
from clvr_jax.pipelines.registry import resolve
from clvr_jax.reasoning.budget import Budget
from clvr_jax.reasoning.images import pixels
from clvr_jax.reasoning.protocols import Controller, Conversation, Drawing
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.oracle import OracleController
from clvr_jax.worlds.shapes.prompts import evaluation_prompts, read_prompts

Mode = Literal["one-shot", "closed-loop"]
ControllerName = Literal["vlm", "oracle"]

_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class System:
    """A way to draw. settings: JSON values that identify it: pictures made with other settings are never mixed in."""

    draw_all: DrawAll
    settings: Mapping[str, Any]


def evaluate_shapes(
    model: str,
    out: Path,
    *,
    split: str = "eval",
    prompts: Path | None = None,
    mode: Mode = "one-shot",
    controller: ControllerName = "vlm",
    max_steps: int | None = None,
    limit: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draws the prompts of the shapes world with a model and scores the pictures; what is in `out` is not drawn again.

    Args:
      model: shipped name or folder.
      out: folder for pictures in GenEval's layout and results.json.
      split: "eval" (553 prompts) or "complex" (300); not used if `prompts` is given.
      prompts: JSONL file in GenEval's metadata format.
      mode: "one-shot" draws each prompt once, "closed-loop" plans, looks and corrects.
      controller: of the closed loop; "oracle" reads pictures exactly and is the ceiling.
      max_steps: drawings of the closed loop at most; 8 if None.
      limit: at most so many prompts, spread evenly over the set.
      steps, guidance: of the sampler in one shot; the model's own if None.
      on_progress: called with (pictures done, pictures in all).
    Returns: the content of results.json, see `shapes.run`.
    Raises: ClvrError, one line, before the model is loaded if model, prompts or folder cannot be used.
    """
    if mode == "one-shot" and max_steps is not None:
        raise UsageError("max_steps is for the closed loop; one shot draws each prompt once")
    if mode == "closed-loop" and (steps is not None or guidance is not None):
        raise UsageError("steps and guidance are for one-shot; the closed loop draws as its model was trained to")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    resolve(model)
    metadata = spread(read_prompts(prompts) if prompts else evaluation_prompts(split), limit)
    check_folder(out)
    if mode == "one-shot":
        system = one_shot(model, steps, guidance)
    else:
        budget = Budget() if max_steps is None else Budget(max_steps=max_steps)
        system = closed_loop(model, controller, metadata, budget)
    settings = {**system.settings, "prompts": prompts.name if prompts else split, "limit": limit}
    return run(metadata, system.draw_all, out, shapes_judge(), settings=settings, on_progress=on_progress)


def spread(metadata: Sequence[Metadata], limit: int | None) -> list[Metadata]:
    """At most `limit` of the prompts, evenly spaced, so that a short run still meets every tag."""
    if limit is None or limit >= len(metadata):
        return list(metadata)
    return [metadata[index * len(metadata) // limit] for index in range(limit)]


def one_shot(model: str, steps: int | None = None, guidance: float | None = None) -> System:
    """A model that draws each prompt once."""
    from clvr_jax.pipelines.flux2 import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(model)
    settings = {
        "mode": "one-shot",
        **_identity(model),
        "steps": steps or pipeline.settings.num_inference_steps,
        "guidance": pipeline.settings.guidance_scale if guidance is None else guidance,
    }

    def draw_all(prompts: list[str], seeds: list[int]) -> list[Drawing]:
        output = pipeline.draw_each(
            prompts, [[]] * len(prompts), seeds, num_inference_steps=steps, guidance_scale=guidance
        )
        return [Drawing(image, output.nfe) for image in output.images]

    return System(draw_all, settings)


def closed_loop(
    model: str, controller: ControllerName, metadata: Sequence[Metadata], budget: Budget | None = None
) -> System:
    """A model that plans, looks and corrects; all prompts of a batch advance together."""
    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

    pipeline = ClosedLoopPipeline.from_pretrained(model)
    judge = Oracle(metadata) if controller == "oracle" else pipeline.controller
    if judge is None:
        raise ClvrError(f"{model}: the folder has no controller/; use the oracle as the controller")
    budget = budget or Budget()
    settings = {
        "mode": "closed-loop",
        **_identity(model, *(["controller"] if controller == "vlm" else [])),
        "controller": controller,
        "max_steps": budget.max_steps,
    }
    return System(lambda prompts, seeds: pipeline.run(prompts, seeds, budget, controller=judge), settings)


class Oracle(Controller):
    """The shapes world's oracle as the loop's controller."""

    def __init__(self, metadata: Sequence[Metadata]):
        requests: dict[str, Metadata] = {}
        for entry in metadata:
            if requests.setdefault(entry["prompt"], entry) != entry:
                raise ClvrError(f"the oracle knows two meanings of the prompt {entry['prompt']!r}; keep one of them")
        self._oracle = OracleController(requests)

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """See `Controller`."""
        return [
            self._oracle.reply(each.prompt, each.replies, [pixels(i) for i in each.images]) for each in conversations
        ]


def _identity(model: str, *more_parts: str) -> dict[str, str]:
    """Name and fingerprint of what draws (and of `more_parts`): a folder that was trained further is another model."""
    path, transformer = resolve(model)
    parts = {transformer, "vae", "text_encoder", "tokenizer", *more_parts}
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(path.rglob("*")):
        place = file.relative_to(path)
        if file.suffix not in (".safetensors", ".json") or not (len(place.parts) == 1 or place.parts[0] in parts):
            continue
        size = file.stat().st_size
        digest.update(f"{place.as_posix()} {size}".encode())
        with file.open("rb") as stream:  # the ends will do: training changes all weights, and files may have gigabytes
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return {"model": model, "weights": digest.hexdigest()}
