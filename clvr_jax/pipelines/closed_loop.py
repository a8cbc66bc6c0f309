"""The closed loop over our own models: a FLUX.2 image generator, and a Qwen3-VL as controller and as verifier."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jax.typing import DTypeLike
from PIL import Image

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import ImageLike, as_pil, pixels
from clvr_jax.interfaces import Usage
from clvr_jax.interfaces.thoughts import strip_thoughts
from clvr_jax.models.common.quantization import Quantization
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.flux2.image_generator import Flux2ImageGenerator
from clvr_jax.pipelines.flux2.io import flux2_heads
from clvr_jax.pipelines.flux2.settings import ReferenceLatents, ReferenceMode
from clvr_jax.pipelines.images import check_size
from clvr_jax.pipelines.loading import (
    QUANTIZED_GENERATOR_PARTS,
    QUANTIZED_PARTS,
    LoRA,
    Mesh,
    Quantize,
    check_heads,
    layout_of,
    quantization_of,
)
from clvr_jax.pipelines.offload import Offload, offloader_of
from clvr_jax.pipelines.qwen3_vl import ChatAnswer, Qwen3VLPipeline
from clvr_jax.pipelines.qwen3_vl import Verifier as LoadedVerifier
from clvr_jax.pipelines.qwen3_vl.pipeline import qwen3_vl_heads
from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory, load_controller
from clvr_jax.pipelines.registry import FLUX2, class_of, resolve
from clvr_jax.processes import broadcast_seconds
from clvr_jax.reasoning.conversation.actions import SYSTEM_PROMPT
from clvr_jax.reasoning.conversation.protocols import Controller, Conversation
from clvr_jax.reasoning.loop import loop
from clvr_jax.reasoning.loop.budget import Budget, StopWhen
from clvr_jax.reasoning.loop.events import Event
from clvr_jax.reasoning.retries import RETRY_TEMPERATURE, retry_rounds, temperature_of
from clvr_jax.reasoning.seeds import derive_seed
from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from clvr_jax.reasoning.verification.reply_check import agrees_with_report
from clvr_jax.reasoning.verification.verification import VerificationMode, Verifier

MAX_PLAN_TEMPERATURE = 1.5
"""Of plans: the verifier checks each of them, and the best one is carried out."""
MAX_REPLY_TOKENS = 384
"""Maximum tokens of a reply of a model that was trained for the loop."""
MAX_UNTRAINED_REPLY_TOKENS = 1024
"""Maximum tokens of a reply of another model; such models list and explain at length."""


class VLMController(Controller):
    """A vision-language model as controller. First attempts are decoded greedily, retries at rising temperatures.

    Args:
      vlm: the model.
      system: system prompt, for models that were not trained for the loop (`reasoning.actions.SYSTEM_PROMPT`).
      max_new_tokens: maximum length of a reply.
      agreement_retries: how often a reply that disagrees with the verifier's report is sampled again, if the model was
        trained for the loop; see `agrees_with_report`. The first reply counts if none agrees.

    Attributes:
      usage: cost of all replies so far.
    """

    def __init__(
        self,
        vlm: Qwen3VLPipeline,
        system: str | None = None,
        max_new_tokens: int = MAX_REPLY_TOKENS,
        agreement_retries: int = 8,
    ):
        self._vlm, self._system, self._max_new_tokens = vlm, system, max_new_tokens
        self._agreement_retries = agreement_retries if system is None else 0
        self.usage = Usage()

    @property
    def pipeline(self) -> Qwen3VLPipeline:
        """The model."""
        return self._vlm

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Returns the replies to all conversations; those of the same temperature are decoded in one call.

        Thoughts are removed; a thought without a reply becomes "", which is then retried because it cannot be parsed.
        """
        replies: dict[int, str] = {}
        temperatures = list(map(_temperature, conversations))
        for temperature in sorted(set(temperatures)):
            rows = [index for index, own in enumerate(temperatures) if own == temperature]
            replies.update(zip(rows, self._replies([conversations[i] for i in rows], temperature), strict=True))
        self._ask_again(conversations, replies)
        return [replies[index] for index in range(len(conversations))]

    def _ask_again(self, conversations: Sequence[Conversation], replies: dict[int, str]) -> None:
        """Samples replies that disagree with their reports again, in place."""
        rows = list(replies)
        for attempts in retry_rounds(self._agreement_retries):
            rows = [index for index in rows if not agrees_with_report(conversations[index], replies[index])]
            if not rows:
                return
            again = [
                dataclasses.replace(
                    conversations[index], seed=derive_seed(conversations[index].seed, "agreement", attempt)
                )
                for index in rows
                for attempt in attempts
            ]
            sampled = iter(zip(again, self._replies(again, RETRY_TEMPERATURE), strict=True))
            for index in rows:
                own = [next(sampled) for _ in attempts]
                good = (reply for conversation, reply in own if agrees_with_report(conversation, reply))
                replies[index] = next(good, replies[index])

    def _replies(self, conversations: Sequence[Conversation], temperature: float) -> list[str]:
        # Drafts in a thought look like actions and must not be executed.
        return [strip_thoughts(answer.text) or "" for answer in self._answers(conversations, temperature)]

    def _answers(self, conversations: Sequence[Conversation], temperature: float) -> list[ChatAnswer]:
        answers = self._vlm.answer_all(
            [each.messages(self._system) for each in conversations],
            [[pixels(image) for image in each.images] for each in conversations],
            self._max_new_tokens,
            temperature,
            [each.seed for each in conversations],
        )
        for answer in answers:
            self.usage += Usage(calls=1, input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
        return answers


def _temperature(conversation: Conversation) -> float:
    if conversation.replies:
        return temperature_of(conversation.attempt)
    return temperature_of(conversation.attempt, MAX_PLAN_TEMPERATURE)


@dataclasses.dataclass(frozen=True)
class ClosedLoopOutput:
    """The result of a loop.

    image: the best image (PIL), None if there is none. trajectory: all steps. nfe, seconds: of the complete loop.
    """

    image: Image.Image | None
    trajectory: Trajectory
    nfe: int
    seconds: float


class ClosedLoopPipeline:
    """Generates an image and its trajectory from a prompt.

    Components are public attributes: `flux` generates images; `controller` plans and decides; `verifier` checks images.
    A directory without `controller/` has neither controller nor verifier unless they are given; then every call of
    `run` needs a controller.
    """

    def __init__(
        self, flux: Flux2Pipeline, controller: Controller | None, model: str = "", verifier: Verifier | None = None
    ):
        self.flux, self.controller, self.model, self.verifier = flux, controller, model, verifier

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = None,
        *,
        controller: str | Controller | None = None,
        verifier: str | Verifier | None = None,
        mesh: Mesh = None,
        lora: Sequence[LoRA] = (),
        ignore_text_encoder: bool = False,
        quantize: Quantize = None,
        offload: Offload = None,
        reference_cache: ReferenceMode | None = None,
        reference_cache_dtype: Quantization | None = None,
        reference_latents: ReferenceLatents | None = None,
        max_reply_tokens: int | None = None,
        prefix_cache_gib: float = 0.0,
    ) -> Self:
        """Loads the models of a loop.

        Args:
          model: a shipped name or a directory in diffusers layout, with a `controller/` beside the other components
            unless `controller` is given.
          dtype: of weights and computation; None is each checkpoint's own on an accelerator, and float32 on a CPU.
          controller: plans and decides: a Qwen3-VL (see `qwen3_vl.verifier.controller_directory`), or any controller,
            such as `providers.loop_roles.ChatModelController` for an endpoint; the model's own if None. A Qwen3-VL that
            was not trained for the loop gets `SYSTEM_PROMPT`.
          verifier: checks images: a Qwen3-VL, or any verifier. If None, a Qwen3-VL that is the controller does so, in
            fresh conversations.
          mesh: all models are placed on it, and compute there; the default device if None.
          lora, ignore_text_encoder: see `Flux2Pipeline.from_pretrained`.
          quantize: "int8" stores the weights of all large models as 8-bit integers; {"controller": "int8"} those of
            one of transformer, text_encoder and controller, which includes a verifier.
          offload: "components" holds all large models in host memory, and copies each to the devices while it computes;
            None leaves them on the devices.
          reference_cache, reference_cache_dtype, reference_latents: see `Flux2Pipeline.from_pretrained`.
          max_reply_tokens: of a Qwen3-VL that is the controller; if None, 384 for one that was trained for the loop,
            and 1024 for others.
          prefix_cache_gib: memory of each device in which each Qwen3-VL keeps the keys and values of earlier
            conversations, see `Qwen3VLPipeline.from_pretrained`; 0 keeps none.
        Raises: UsageError for a prefix cache without a Qwen3-VL; ClvrError, before any weights are read, for a
          controller or a verifier that is no Qwen3-VL, and for a mesh that does not divide the attention heads.
        """
        path, transformer = resolve(model)
        layout = layout_of(mesh)
        if controller is None and (path / "controller").is_dir():
            controller = model
        # Configurations are checked before weights are read, which takes minutes.
        names = {"controller": controller, "verifier": verifier}
        found = {part: controller_directory(name) for part, name in names.items() if isinstance(name, str)}
        if layout is not None and class_of(path) in FLUX2:
            heads = flux2_heads(model, transformer)
            check_heads(layout, {**heads, **_heads({part: directory for part, (directory, _) in found.items()})})
        if prefix_cache_gib and not found:
            raise UsageError("prefix cache: there is no Qwen3-VL to load that could use it; leave it out")
        # Without a Qwen3-VL to load, a format for the controller is an error, not ignored.
        formats = quantization_of(quantize, QUANTIZED_PARTS if found else QUANTIZED_GENERATOR_PARTS)
        quantized = formats.pop("controller", None)
        options: dict[str, Any] = {"mesh": layout, "lora": lora, "ignore_text_encoder": ignore_text_encoder}
        offloader = offloader_of(offload)
        options |= {"quantize": formats, "offload": offloader, "reference_cache": reference_cache}
        options |= {"reference_cache_dtype": reference_cache_dtype, "reference_latents": reference_latents}
        flux = Flux2Pipeline.from_pretrained(model, dtype, **options)
        chat: dict[str, Any] = {"quantize": quantized, "offload": offloader, "prefix_cache_gib": prefix_cache_gib}
        vlm = load_controller(controller, dtype, layout, **chat) if isinstance(controller, str) else None
        if isinstance(verifier, str) and verifier != controller:
            verifier = LoadedVerifier.from_pretrained(verifier, dtype, mesh=layout, **chat)
        if isinstance(controller, str) and vlm is not None:
            _, is_trained = found["controller"]
            if verifier is None or isinstance(verifier, str):
                verifier = LoadedVerifier.of_pipeline(vlm, controller, is_trained)
            limit = max_reply_tokens or (MAX_REPLY_TOKENS if is_trained else MAX_UNTRAINED_REPLY_TOKENS)
            controller = VLMController(vlm, None if is_trained else SYSTEM_PROMPT, limit)
        assert not isinstance(controller, str)
        assert not isinstance(verifier, str)
        return cls(flux, controller, model, verifier)

    def __call__(
        self,
        prompt: str,
        *,
        max_steps: int = 8,
        max_nfe: int | None = None,
        max_seconds: float | None = None,
        stop_when: StopWhen = "controller",
        candidates: int = 1,
        max_plan_retries: int = Budget.max_plan_retries,
        seed: int = 0,
        nfe: int | None = None,
        verification: VerificationMode = "separate",
        on_event: Callable[[Event], None] | None = None,
        images: Sequence[ImageLike] = (),
        height: int | None = None,
        width: int | None = None,
    ) -> ClosedLoopOutput:
        """Runs the loop for one prompt.

        Args:
          prompt: describes the image, or the change of the given images.
          max_steps, max_nfe, max_seconds, stop_when, candidates, max_plan_retries: see `Budget`.
          seed: the same seed gives the same trajectory.
          nfe: network evaluations for each image, two a step with guidance; the model's own if None.
          verification: who accepts an image, see `reasoning.loop.run`.
          on_event: called with each event of the loop.
          images: the user's own images to edit or to combine, references of every step in this order.
          height, width: of the generated images, both or none; those of the first reference, else the model's, if None.
        Raises: UsageError for invalid limits or an invalid size.
        """
        began = time.monotonic()
        budget = Budget(
            max_steps,
            max_nfe,
            max_seconds,
            stop_when=stop_when,
            candidates=candidates,
            max_plan_retries=max_plan_retries,
        )
        options: dict[str, Any] = {"nfe": nfe, "verification": verification, "on_event": on_event}
        options |= {"images": [images], "height": height, "width": width} if images or height or width else {}
        (trajectory,) = self.run([prompt], [seed], budget, **options)
        image = None if trajectory.image is None else as_pil(trajectory.image)
        return ClosedLoopOutput(image, trajectory, trajectory.nfe, time.monotonic() - began)

    def run(
        self,
        prompts: Sequence[str],
        seeds: int | Sequence[int] = 0,
        budget: Budget | None = None,
        *,
        controller: Controller | None = None,
        verifier: Verifier | None = None,
        nfe: int | None = None,
        verification: VerificationMode = "separate",
        on_event: Callable[[Event], None] | None = None,
        images: Sequence[Sequence[ImageLike]] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[Trajectory]:
        """Runs the loop for several prompts together.

        Args: as in `__call__`, and
          controller, verifier: used in place of the pipeline's own.
          images: the user's own images for each prompt; None: no images.
        Raises: ClvrError without a controller, or without a verifier where `verification` needs one.
        """
        chosen = controller or self.controller
        if chosen is None:
            raise ClvrError(f"{self.model or 'pipeline'}: the directory has no controller/; give a controller")
        if (height is None) != (width is None):
            raise UsageError("height and width must be given together; give both or none")
        size = None if height is None or width is None else (height, width)
        if size is not None:
            check_size(*size, self.flux.vae.config.token_pixels)
        steps = None if nfe is None else self.flux.steps_for(nfe)
        self.flux.check_prompts(prompts)  # before the controller runs, which takes minutes
        image_generator = Flux2ImageGenerator(self.flux, steps, size=size)
        chosen_verifier = (verifier or self.verifier) if verification == "separate" else None
        if verification == "separate" and chosen_verifier is None:
            raise ClvrError(
                f"{self.model or 'pipeline'}: there is no verifier; give one or choose verification controller or none"
            )
        return loop.run(
            prompts,
            chosen,
            image_generator,
            budget,
            seeds,
            on_event,
            verification=verification,
            verifier=chosen_verifier,
            model=self.model,
            images=images,
            clock=broadcast_seconds,
        )


def _heads(directories: Mapping[str, Path]) -> dict[str, int]:
    """Returns the attention heads of several Qwen3-VL models by their names in messages."""
    heads = [qwen3_vl_heads(directory, part) for part, directory in directories.items()]
    return {name: count for own in heads for name, count in own.items()}
