"""The closed loop over our own models: a FLUX.2 image generator, and a Qwen3-VL as controller and as verifier."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Self

from jax.typing import DTypeLike
from PIL import Image

from clvr_jax.errors import ClvrError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import resolve
from clvr_jax.pipelines.verifier import Verifier as LoadedVerifier
from clvr_jax.pipelines.verifier import controller_directory
from clvr_jax.pipelines.vlm import ChatAnswer, Qwen3VLPipeline
from clvr_jax.reasoning import loop
from clvr_jax.reasoning.actions import SYSTEM_PROMPT
from clvr_jax.reasoning.budget import Budget, StopWhen
from clvr_jax.reasoning.events import Event
from clvr_jax.reasoning.images import as_pil, pixels
from clvr_jax.reasoning.protocols import Controller, Conversation, Drawer, Drawing, DrawRequest
from clvr_jax.reasoning.thoughts import strip_thoughts
from clvr_jax.reasoning.tools import Usage
from clvr_jax.reasoning.trajectory import Trajectory
from clvr_jax.reasoning.verification import VerificationMode, Verifier

RETRY_TEMPERATURE = 0.7
MAX_REPLY_TOKENS = 384


class VLMController(Controller):
    """A vision-language model that plans, judges and decides; greedy at first, sampling when it has to try again.

    system: system prompt, for models that were not trained on the loop's contract (`reasoning.actions.SYSTEM_PROMPT`).
    usage: what all replies have cost so far.
    """

    def __init__(self, vlm: Qwen3VLPipeline, system: str | None = None, max_new_tokens: int = MAX_REPLY_TOKENS):
        self._vlm, self._system, self._max_new_tokens = vlm, system, max_new_tokens
        self.usage = Usage()

    def reply(self, conversations: Sequence[Conversation]) -> list[str]:
        """Replies to all conversations: first attempts greedily in one call, retries sampled in another.

        A thought is no part of a reply; "", which nobody can read, stands for a thought without a reply.
        """
        answers: dict[int, ChatAnswer] = {}
        for is_retry in (False, True):
            rows = [index for index, each in enumerate(conversations) if bool(each.attempt) == is_retry]
            if rows:
                temperature = RETRY_TEMPERATURE if is_retry else 0.0
                answers.update(zip(rows, self._answers([conversations[i] for i in rows], temperature), strict=True))
        # Drafts in a thought look like actions, and must never be carried out.
        return [strip_thoughts(answers[index].text) or "" for index in range(len(conversations))]

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


class Flux2Drawer(Drawer):
    """A FLUX.2 pipeline that draws under the whole history.

    steps, guidance: the model's own if None.
    """

    def __init__(self, pipeline: Flux2Pipeline, steps: int | None = None, guidance: float | None = None):
        self._pipeline, self._steps, self._guidance = pipeline, steps, guidance

    def draw(self, requests: Sequence[DrawRequest]) -> list[Drawing]:
        """See `Drawer`."""
        histories = [self._pipeline.fit_history(request.prompt, request.replies) for request in requests]
        output = self._pipeline.draw_each(
            [history.text for history in histories],
            [[as_pil(image) for image in request.images] for request in requests],
            [request.seed for request in requests],
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
        )
        return [
            Drawing(image, output.nfe, history.left_out)
            for image, history in zip(output.images, histories, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class ClosedLoopOutput:
    """image: the best picture (PIL), None if there is none. trajectory: what happened. nfe, seconds: in all."""

    image: Image.Image | None
    trajectory: Trajectory
    nfe: int
    seconds: float


class ClosedLoopPipeline:
    """Prompt in, image and trajectory out.

    Components are public attributes: `flux` generates images; `controller` plans and decides, None for a directory
    without `controller/`, which then needs one at every call; `verifier` checks images, None where nobody can.
    """

    def __init__(
        self, flux: Flux2Pipeline, controller: Controller | None, model: str = "", verifier: Verifier | None = None
    ):
        self.flux, self.controller, self.model, self.verifier = flux, controller, model, verifier

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike = "float32",
        *,
        controller: str | None = None,
        verifier: str | None = None,
    ) -> Self:
        """Loads the models of a loop.

        Args:
          model: a shipped name or a directory in diffusers layout, with a `controller/` beside the other components
            unless `controller` is given.
          dtype: of weights and computation.
          controller: the Qwen3-VL that plans, see `pipelines.verifier.controller_directory`; the model's own if None.
          verifier: the model that verifies, in the same way; the controller's weights in fresh conversations if None.
        """
        path, _ = resolve(model)
        flux = Flux2Pipeline.from_pretrained(model, dtype)
        name = controller or (model if (path / "controller").is_dir() else None)
        if name is None:
            checks = None if verifier is None else LoadedVerifier.from_pretrained(verifier, dtype)
            return cls(flux, None, model, checks)
        directory, is_trained = controller_directory(name)
        vlm = Qwen3VLPipeline.from_pretrained(directory, dtype)
        if verifier is None or verifier == name:
            checks = LoadedVerifier.of_pipeline(vlm, name, is_trained)
        else:
            checks = LoadedVerifier.from_pretrained(verifier, dtype)
        return cls(flux, VLMController(vlm, None if is_trained else SYSTEM_PROMPT), model, checks)

    def __call__(
        self,
        prompt: str,
        *,
        max_steps: int = 8,
        max_nfe: int | None = None,
        max_seconds: float | None = None,
        stop_when: StopWhen = "controller",
        candidates: int = 1,
        seed: int = 0,
        nfe: int | None = None,
        verification: VerificationMode = "separate",
        on_event: Callable[[Event], None] | None = None,
    ) -> ClosedLoopOutput:
        """Runs the loop for one prompt.

        Args:
          prompt: what to draw.
          max_steps, max_nfe, max_seconds, stop_when, candidates: see `Budget`.
          seed: the same seed gives the same trajectory.
          nfe: network evaluations of each drawing, which guidance counts twice; the model's own if None.
          verification: who accepts an image, see `reasoning.loop.run`.
          on_event: called as things happen.
        Raises: UsageError for limits that make no sense.
        """
        began = time.monotonic()
        budget = Budget(max_steps, max_nfe, max_seconds, stop_when=stop_when, candidates=candidates)
        (trajectory,) = self.run([prompt], [seed], budget, nfe=nfe, verification=verification, on_event=on_event)
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
    ) -> list[Trajectory]:
        """Runs the loop for several prompts together.

        Args: as in `__call__`, and
          controller, verifier: take the place of the pipeline's own.
        Raises: ClvrError without a controller, or without a verifier where `verification` needs one.
        """
        chosen = controller or self.controller
        if chosen is None:
            raise ClvrError(f"{self.model or 'pipeline'}: the folder has no controller/; give a controller")
        steps = None if nfe is None else self.flux.steps_for(nfe)
        self.flux.check_prompts(prompts)  # now, not after the controller has worked for minutes
        drawer = Flux2Drawer(self.flux, steps)
        checks = (verifier or self.verifier) if verification == "separate" else None
        if verification == "separate" and checks is None:
            raise ClvrError(
                f"{self.model or 'pipeline'}: there is no verifier; give one or choose verification controller or none"
            )
        return loop.run(
            prompts,
            chosen,
            drawer,
            budget,
            seeds,
            on_event,
            verification=verification,
            verifier=checks,
            model=self.model,
        )
