"""What a benchmark measures: a way to draw, as a function of prompts and seeds, that any benchmark can use."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import override

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.blind import BlindController, BlindVerifier
from clvr_jax.evaluation.drawn import DrawAll, Drawn
from clvr_jax.evaluation.open_loop import WholePlan
from clvr_jax.pipelines.loading import lora_path
from clvr_jax.pipelines.registry import resolve
from clvr_jax.pipelines.verifier import controller_directory
from clvr_jax.reasoning.budget import Budget
from clvr_jax.reasoning.images import pixels
from clvr_jax.reasoning.protocols import Controller, Conversation, Drawing
from clvr_jax.reasoning.tools import Usage
from clvr_jax.reasoning.verification import VerificationMode
from clvr_jax.worlds.shapes.metadata import Metadata
from clvr_jax.worlds.shapes.oracle import OracleController

if TYPE_CHECKING:
    from clvr_jax.pipelines.flux2 import Flux2Pipeline

Mode = Literal["one-shot", "open-loop", "best-of", "closed-loop"]
PlannedMode = Literal["open-loop", "best-of", "closed-loop"]

_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class System:
    """A way to draw.

    Attributes:
      draw_all: (prompts, seeds) -> one result per prompt.
      settings: JSON values that identify it: pictures made with other settings are never mixed in.
      device: what draws, recorded with each picture.
      batch_size: prompts that it likes to draw at a time.
    """

    draw_all: DrawAll
    settings: Mapping[str, Any]
    device: str | None = None
    batch_size: int = 16


def one_shot(
    model: str,
    steps: int | None = None,
    guidance: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    **loading: Any,
) -> System:
    """A model that draws each prompt once.

    Args:
      model: shipped name, folder or Hugging Face id.
      steps, guidance: of the sampler; the model's own if None.
      size: height and width in pixels; the model's own if None.
      loading: arguments of `Flux2Pipeline.from_pretrained`, such as dtype, mesh and lora.
    """
    from clvr_jax.pipelines.flux2 import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained(model, **loading)
    height, width = size or (None, None)
    settings = {
        "mode": "one-shot",
        **_identity(model),
        "steps": steps or pipeline.settings.num_inference_steps,
        "guidance": pipeline.settings.guidance_scale if guidance is None else guidance,
        **_loaded(pipeline, size, loading),
    }

    def draw_all(prompts: list[str], seeds: list[int]) -> list[Drawing]:
        output = pipeline.draw_each(
            prompts,
            [[]] * len(prompts),
            seeds,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
        )
        return [Drawing(image, output.nfe) for image in output.images]

    return System(draw_all, settings, _device())


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
    size: tuple[int, int] | None = None,
    **loading: Any,
) -> System:
    """A model that draws what a controller plans; all prompts of a batch advance together.

    Args:
      model: shipped name, folder or Hugging Face id; of one that has a controller/, unless `controller` is given.
      mode: "closed-loop" plans, generates, verifies and corrects. "open-loop" plans the whole image and generates it
        once; nobody looks at it. "best-of" generates the whole plan `budget.candidates` times and takes the best image.
      budget: limits per prompt.
      controller: plans and judges, the model's own if None.
      controller_name: identifies it.
      verification: who accepts an image, see `reasoning.loop.run`; if None, the controller if it is given, else a
        separate verifier.
      verifier: the model that verifies; the model's own controller in fresh conversations if None.
      is_blind: the ablation: controller and verifier see a blank canvas in place of every image.
      size: height and width in pixels; the model's own if None.
      loading: arguments of `ClosedLoopPipeline.from_pretrained`, such as dtype, mesh and lora.
    """
    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

    pipeline = ClosedLoopPipeline.from_pretrained(model, verifier=verifier, **loading)
    height, width = size or (None, None)
    accepts: VerificationMode = verification or ("separate" if controller is None else "controller")
    if mode == "open-loop":
        accepts = "none"
    chosen = controller or pipeline.controller
    if chosen is None:
        raise ClvrError(f"{model}: the folder has no controller/; use the oracle or an endpoint as the controller")
    limits = limits_of(mode, budget)
    used = chosen if mode == "closed-loop" else WholePlan(chosen)
    checks = pipeline.verifier if accepts == "separate" else None
    if is_blind:
        used, checks = BlindController(used), None if checks is None else BlindVerifier(checks)

    def draw_all(prompts: list[str], seeds: list[int]) -> list[Drawn]:
        before = _usage(chosen)
        trajectories = pipeline.run(
            prompts, seeds, limits, controller=used, verifier=checks, verification=accepts, height=height, width=width
        )
        shares = _shares(before, _usage(chosen), len(prompts))
        return [
            replace(Drawn.of(trajectory), usage=usage) for trajectory, usage in zip(trajectories, shares, strict=True)
        ]

    settings = {
        "mode": mode,
        **_identity(model, *([] if controller else ["controller"])),
        "controller": controller_name,
        **({} if mode == "open-loop" else {"verification": accepts}),
        **({} if verifier is None else {"verifier": _identity_of_verifier(verifier)}),
        **({"blind": True} if is_blind else {}),
        **_loaded(pipeline.flux, size, loading),
        **described(limits),
    }
    # All candidates of all prompts are drawn together: as many pictures at a time as without candidates.
    return System(draw_all, settings, _device(), max(1, System.batch_size // limits.candidates))


def limits_of(mode: PlannedMode, budget: Budget | None) -> Budget:
    """The loop's budget in a mode: the open loop draws once and is done, best-of draws nothing but its candidates.

    Raises: UsageError for best-of with less than two candidates.
    """
    budget = budget or Budget()
    if mode == "open-loop":
        return replace(budget, max_steps=1, candidates=1, stop_when="drawn")
    if mode == "best-of":
        if budget.candidates < 2:
            raise UsageError("best-of chooses among several drawings; give at least 2 candidates")
        return replace(budget, max_steps=budget.candidates)
    return budget


def described(budget: Budget) -> dict[str, Any]:
    """A budget for settings: the number of steps, and what is not as usual."""
    usual = asdict(Budget())
    return {key: value for key, value in asdict(budget).items() if key == "max_steps" or value != usual[key]}


def _usage(controller: Controller) -> Usage:
    return getattr(controller, "usage", Usage())


def _shares(before: Usage, after: Usage, count: int) -> list[Usage]:
    """What was spent between, divided among the prompts of a batch; whole tokens, and their sum is exact."""
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
    if device.platform == "cpu":  # JAX tells nothing else of it
        return f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return f"{device.device_kind} x {jax.device_count()}"


class Oracle(Controller):
    """The shapes world's oracle as the loop's controller, for prompts whose metadata it is given."""

    def __init__(self, metadata: Sequence[Metadata]):
        requests: dict[str, Metadata] = {}
        for entry in metadata:
            if requests.setdefault(entry["prompt"], entry) != entry:
                raise ClvrError(f"the oracle knows two meanings of the prompt {entry['prompt']!r}; keep one of them")
        self._oracle = OracleController(requests)

    @override
    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        return [
            self._oracle.reply(each.prompt, each.replies, [pixels(i) for i in each.images]) for each in conversations
        ]


def _identity(model: str, *more_parts: str) -> dict[str, str]:
    """Name and fingerprint of what draws (and of `more_parts`): a folder that was trained further is another model."""
    path, transformer = resolve(model)
    return {"model": model, "weights": _digest(path, {transformer, "vae", "text_encoder", "tokenizer", *more_parts})}


def _loaded(pipeline: "Flux2Pipeline", size: tuple[int, int] | None, loading: Mapping[str, Any]) -> dict[str, Any]:
    """What changes images and is not as usual: size, dtype and LoRAs. A mesh changes nothing but rounding."""
    dtype = str(pipeline.transformer.x_embedder.kernel.dtype)
    loras = [
        {"name": name, "weight": weight, "weights": _digest_of_lora(lora_path(name))}
        for name, weight in loading.get("lora", ())
    ]
    return {
        **({} if size is None else {"size": list(size)}),
        **({} if dtype == "float32" else {"dtype": dtype}),
        **({"lora": loras} if loras else {}),
    }


def _digest_of_lora(path: Path) -> str:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _identity_of_verifier(model: str) -> dict[str, str]:
    """Name and fingerprint of a model that verifies."""
    path, _ = controller_directory(model)
    return {"model": model, "weights": _digest(path, set())}


def _digest(path: Path, parts: Set[str]) -> str:
    """A fingerprint of the weights and settings in a directory and in those subdirectories."""
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
    return digest.hexdigest()
