"""Systems of our own models: one-shot generation, and the modes in which a controller plans.

Pipelines are imported where they are used: systems of external images and of endpoints need neither them nor JAX, which
take 170 MiB.
"""

import hashlib
import os
import platform
from collections.abc import Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from typing_extensions import override

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.systems.ablations import BlindController, BlindVerifier, ExactDescriptions
from clvr_jax.evaluation.systems.open_loop import OpenLoopController
from clvr_jax.evaluation.systems.system import System, SystemOutput
from clvr_jax.files.image_io import pixels
from clvr_jax.files.json_input import JSON
from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.conversation.protocols import Controller, Conversation, GeneratedImage
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.verification.verification import VerificationMode
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.oracle import OracleController

if TYPE_CHECKING:
    from clvr_jax.pipelines.flux2 import Flux2Pipeline
    from clvr_jax.pipelines.loading import LoadArguments

Mode = Literal["one-shot", "open-loop", "best-of", "closed-loop"]
PlannedMode = Literal["open-loop", "best-of", "closed-loop"]

_SAMPLE_BYTES = 1 << 20
_REFERENCES = ("reference_cache", "reference_latents")
"""The settings of a pipeline that say how images refer to others."""


def one_shot(
    model: str,
    steps: int | None = None,
    guidance: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    **loading: "Unpack[LoadArguments]",
) -> System:
    """Returns a system that generates one image from each prompt as it is.

    Args:
      model: shipped name, directory or Hugging Face id.
      steps: number of sampler steps; the model's default if None.
      guidance: guidance scale; the model's default if None.
      size: height and width in pixels; the model's default if None.
      loading: arguments of `Flux2Pipeline.from_pretrained`, such as dtype, mesh and lora.
    """
    from clvr_jax.pipelines.flux2 import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(model, **loading)
    height, width = size or (None, None)
    settings: dict[str, JSON] = {
        "mode": "one-shot",
        **_identity(model),
        "steps": steps or pipeline.settings.num_inference_steps,
        "guidance": pipeline.settings.guidance_scale if guidance is None else guidance,
        **_loaded(pipeline, size, loading),
    }

    def generate(prompts: list[str], seeds: list[int]) -> list[GeneratedImage]:
        output = pipeline.generate_each(
            prompts,
            [[]] * len(prompts),
            seeds,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
        )
        return [GeneratedImage(image, output.nfe) for image in output.images]

    return System(generate, settings, _device())


def planned(
    model: str,
    mode: PlannedMode = "closed-loop",
    budget: Budget | None = None,
    controller: Controller | None = None,
    controller_name: str = "vlm",
    *,
    verification: VerificationMode | None = None,
    verifier: str | None = None,
    is_blind: bool = False,
    has_exact_descriptions: bool = False,
    size: tuple[int, int] | None = None,
    **loading: "Unpack[LoadArguments]",
) -> System:
    """Returns a system whose controller plans each image; all prompts of a batch advance together.

    Args:
      model: shipped name, directory or Hugging Face id; it needs a controller/ if `controller` is None.
      mode: "closed-loop" plans, generates, verifies and corrects. "open-loop" plans the whole image and generates it
        once, without verification. "best-of" generates the whole plan `budget.candidates` times and returns the best
        image.
      budget: limits per prompt.
      controller: plans and judges; the model's own controller if None.
      controller_name: identifies the controller in the settings.
      verification: what accepts an image, as in `reasoning.loop.run`; if None, the controller if it is given, else a
        separate verifier.
      verifier: the model that verifies; the model's own controller in fresh conversations if None.
      is_blind: whether controller and verifier see a blank canvas in place of every image, as an ablation.
      has_exact_descriptions: whether the detector of the shapes world describes images for a separate verifier, as an
        ablation.
      size: height and width in pixels; the model's default if None.
      loading: arguments of `ClosedLoopPipeline.from_pretrained`, such as dtype, mesh and lora.
    Raises: ClvrError if the model has no controller and none is given.
    """
    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

    pipeline = ClosedLoopPipeline.from_pretrained(model, verifier=verifier, **loading)
    height, width = size or (None, None)
    accepts: VerificationMode = verification or ("separate" if controller is None else "controller")
    if mode == "open-loop":
        accepts = "none"
    chosen = controller or pipeline.controller
    if chosen is None:
        raise ClvrError(f"{model}: the directory has no controller/; use the oracle or an endpoint as the controller")
    limits = budget_for_mode(mode, budget)
    used = chosen if mode == "closed-loop" else OpenLoopController(chosen)
    checks = pipeline.verifier if accepts == "separate" else None
    if has_exact_descriptions and checks is not None:
        checks = ExactDescriptions(checks)
    if is_blind:
        used, checks = BlindController(used), None if checks is None else BlindVerifier(checks)

    def generate(prompts: list[str], seeds: list[int]) -> list[SystemOutput]:
        before = _usage(chosen)
        trajectories = pipeline.run(
            prompts, seeds, limits, controller=used, verifier=checks, verification=accepts, height=height, width=width
        )
        shares = _usage_per_prompt(before, _usage(chosen), len(prompts))
        return [
            replace(SystemOutput.from_result(trajectory), usage=usage)
            for trajectory, usage in zip(trajectories, shares, strict=True)
        ]

    settings: dict[str, JSON] = {
        "mode": mode,
        **_identity(model, *([] if controller else ["controller"])),
        "controller": controller_name,
        **({} if mode == "open-loop" else {"verification": accepts}),
        **({} if verifier is None else {"verifier": _identity_of_verifier(verifier)}),
        **({"blind": True} if is_blind else {}),
        **({"descriptions": "detector"} if has_exact_descriptions else {}),
        **_loaded(pipeline.flux, size, loading),
        **non_default_fields(limits),
    }
    # All candidates of all prompts are generated together; a batch has as many images as without candidates.
    return System(generate, settings, _device(), max(1, System.batch_size // limits.candidates))


def budget_for_mode(mode: PlannedMode, budget: Budget | None) -> Budget:
    """Returns the loop's budget in a mode: one image for open-loop, and only the candidates for best-of.

    Raises: UsageError for best-of with fewer than two candidates.
    """
    budget = budget or Budget()
    if mode == "open-loop":
        return replace(budget, max_steps=1, candidates=1, stop_when="drawn")
    if mode == "best-of":
        if budget.candidates < 2:
            raise UsageError("best-of chooses among several images; give at least 2 candidates")
        return replace(budget, max_steps=budget.candidates)
    return budget


def non_default_fields(budget: Budget) -> dict[str, JSON]:
    """Returns max_steps and the fields of a budget that differ from their default, for the settings of a system."""
    defaults = asdict(Budget())
    return {key: value for key, value in asdict(budget).items() if key == "max_steps" or value != defaults[key]}


def _usage(controller: Controller) -> Usage:
    return getattr(controller, "usage", Usage())


def _usage_per_prompt(before: Usage, after: Usage, count: int) -> list[Usage]:
    """Divides the difference of two usages among the prompts of a batch; token counts are integers with exact sum."""
    spent = {key: value - getattr(before, key) for key, value in asdict(after).items()}
    return [
        Usage(
            input_tokens=spent["input_tokens"] * (index + 1) // count - spent["input_tokens"] * index // count,
            output_tokens=spent["output_tokens"] * (index + 1) // count - spent["output_tokens"] * index // count,
            dollars=spent["dollars"] / count,
        )
        for index in range(count)
    ]


def _device() -> str:
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":  # JAX has no name of the processor
        return f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return f"{device.device_kind} x {jax.device_count()}"


class Oracle(Controller):
    """The oracle of the shapes world as a controller, for prompts with known metadata."""

    def __init__(self, metadata: Sequence[Metadata]):
        requests: dict[str, Metadata] = {}
        for entry in metadata:
            if requests.setdefault(entry["prompt"], entry) != entry:
                raise ClvrError(
                    f"oracle: the prompt {entry['prompt']!r} has two meanings in the metadata; keep one of them"
                )
        self._oracle = OracleController(requests)

    @override
    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        return [
            self._oracle.reply(each.prompt, each.replies, [pixels(i) for i in each.images]) for each in conversations
        ]


def _identity(model: str, *more_parts: str) -> dict[str, str]:
    """Returns the name of a model and a fingerprint of the generator's weights and of `more_parts`.

    A directory that was trained further has another fingerprint, so it is another model.
    """
    from clvr_jax.pipelines.registry import resolve

    path, transformer = resolve(model)
    return {"model": model, "weights": _digest(path, {transformer, "vae", "text_encoder", "tokenizer", *more_parts})}


def _loaded(pipeline: "Flux2Pipeline", size: tuple[int, int] | None, loading: "LoadArguments") -> dict[str, JSON]:
    """Returns the settings that change images and are not the defaults: size, dtype, LoRAs, use of references.

    The mesh is not among them: it changes only rounding.
    """
    from clvr_jax.pipelines.loading import lora_path, quantization_of, weighted

    own = pipeline.settings
    dtype = str(pipeline.transformer.x_embedder.kernel.dtype)
    loras: list[JSON] = [
        {"name": name, "weight": weight, "weights": _digest_of_lora(lora_path(name))}
        for name, weight in weighted(loading.get("lora", ()))
    ]
    return {
        **({} if size is None else {"size": list(size)}),
        **({} if dtype == "float32" else {"dtype": dtype}),
        **({"lora": loras} if loras else {}),
        **({"quantize": quantized} if (quantized := quantization_of(loading.get("quantize"))) else {}),
        **({"reference_cache_dtype": cached} if (cached := pipeline.reference_cache_dtype) else {}),
        **{name: value for name in _REFERENCES if (value := getattr(pipeline, name)) != getattr(own, name)},
    }


def _digest_of_lora(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _identity_of_verifier(model: str) -> dict[str, str]:
    """Returns the name and the fingerprint of a model that verifies."""
    from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory

    path, _ = controller_directory(model)
    return {"model": model, "weights": _digest(path, set())}


def _digest(path: Path, parts: Set[str]) -> str:
    """Returns a fingerprint of the weights and settings in a directory and in the subdirectories `parts`."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.suffix not in (".safetensors", ".json") or not (len(relative.parts) == 1 or relative.parts[0] in parts):
            continue
        size = file.stat().st_size
        digest.update(f"{relative.as_posix()} {size}".encode())
        # Both ends suffice, because training changes all weights; files may have gigabytes.
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            stream.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
