"""Options for the system that a benchmark measures, for every `clvr eval` command that generates images."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from clvr_jax.arguments import at_least_one, check_guidance, check_seed
from clvr_jax.commands.common import Count, Directory, Guidance
from clvr_jax.commands.generation.budget import BudgetOptions, Limits
from clvr_jax.commands.generation.model_options import Loading, LoadOptions, check_model_size, parse_size
from clvr_jax.errors import UsageError
from clvr_jax.files.json_input import UncheckedJSON

if TYPE_CHECKING:
    from clvr_jax.evaluation.systems.system import System
    from clvr_jax.interfaces import ChatModel, ImageModel
    from clvr_jax.reasoning.conversation.protocols import Controller

Url = Annotated[str | None, tyro.conf.arg(metavar="URL")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class SystemOptions:
    """Options for the system that generates: one of our models in one of its modes, an endpoint, or a directory of
    images."""

    model: str
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id. With --endpoint
    it is the server's name for the model, and with --pictures any name."""
    mode: Literal["one-shot", "open-loop", "best-of", "closed-loop"] = "one-shot"
    """How images are generated. one-shot: from the prompt. open-loop: from a plan. best-of: several from a plan, of
    which the best verified one is kept (--candidates). closed-loop: in the closed loop."""
    controller: Literal["vlm", "oracle", "endpoint"] = "vlm"
    """Who plans and corrects. vlm: the controller of the model. oracle: the oracle of the shapes world. endpoint: a
    model behind --controller-endpoint."""
    verification: Literal["separate", "controller", "none"] | None = None
    """Who accepts an image. separate: a verifier that sees the image without the conversation. controller: the
    controller, in its conversation. none: nobody. If not given, separate with the model's own controller, and
    controller with another one."""
    verifier: Name = None
    """With --verification separate: verify with this model, a shipped name or a directory or Hugging Face id of a
    Qwen3-VL. If not given, the model's own controller verifies, in a new conversation for each image."""
    blind: bool = False
    """Ablation: give controller and verifier a blank canvas in place of every image."""
    descriptions: Literal["model", "detector"] = "model"
    """Ablation in the shapes world. detector: a program describes images for the verifier."""
    budget: Limits = field(default_factory=BudgetOptions)
    steps: Count = None
    """With --mode one-shot: number of sampler steps; the model's own number if not given."""
    guidance: Guidance = None
    """With --mode one-shot: scale of classifier-free guidance; the model's own if not given."""
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Generate images of this height and width in pixels, or of this number for both; the model's own size if not
    given."""
    loading: Loading = field(default_factory=LoadOptions)
    seed: int = 0
    """The same seed gives the same images."""
    pictures: Directory = None
    """Score the images of this directory in place of generating: either metadata.jsonl with file_name and prompt in
    each line, or the directories of GenEval."""
    endpoint: Url = None
    """Generate with a model behind this OpenAI-compatible images API. Give the URL up to and including the version,
    such as https://api.openai.com/v1."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key of --endpoint; "" for a server without keys."""
    in_flight: int = 16
    """Send at most this many prompts to --endpoint at a time."""
    picture_size: Annotated[tuple[int, ...], tyro.conf.arg(metavar="HEIGHT WIDTH")] = ()
    """Ask --endpoint for images of this height and width; the server chooses if not given."""
    picture_references: Literal["edits", "generations"] = "edits"
    """How images to be edited are sent to --endpoint. edits: as uploads to /images/edits. generations: inside the
    request, as Seedream expects."""
    picture_format: Literal["b64_json", "url"] | None = None
    """Ask --endpoint to return images in this form; the request does not name one if not given, as GPT-Image requires.
    """
    image_hosts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST ...")] = ()
    """Fetch images from these hosts as well if --endpoint returns addresses: hosts of the own network, and hosts that
    addresses redirect to."""
    endpoint_max_seconds: float = 1200.0
    """Wait this many seconds at most for a whole response of --endpoint, however slowly it comes."""
    sends_seed: bool = False
    """Send a seed with each request to --endpoint, which not every server accepts."""
    picture_price: float = 0.0
    """Dollars that --endpoint charges for an image; 0 counts no cost."""
    controller_endpoint: Url = None
    """With --controller endpoint: OpenAI-compatible chat API of the controller, up to and including the version."""
    controller_model: Name = None
    """The server's name for the model behind --controller-endpoint."""
    controller_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key of --controller-endpoint; "" for a server without keys."""
    controller_tokens: Count = None
    """Most tokens of a reply of --controller-endpoint, for models that think first; 1024 if not given."""
    controller_max_seconds: float = 1200.0
    """Wait this many seconds at most for a whole reply of --controller-endpoint, however slowly it comes."""
    controller_prices: Annotated[tuple[float, ...], tyro.conf.arg(metavar="READ WRITTEN")] = ()
    """Dollars that --controller-endpoint charges for a million input tokens and for a million output tokens; the cost
    is not counted if not given."""

    def __post_init__(self) -> None:
        at_least_one("--steps", self.steps)
        at_least_one("--in-flight", self.in_flight)
        at_least_one("--controller-tokens", self.controller_tokens)
        check_guidance(self.guidance)
        check_seed(self.seed)
        if self.mode == "one-shot" and self.budget != BudgetOptions():
            raise UsageError("--max-steps, --candidates and other limits are for the loop, not for --mode one-shot")
        if self.mode != "one-shot" and (self.steps is not None or self.guidance is not None):
            raise UsageError("--steps and --guidance are for --mode one-shot; other modes use the model's own")
        is_exact = self.descriptions == "detector"
        verifies = self.verification is not None or self.verifier is not None or self.blind or is_exact
        if verifies and (self.mode not in ("closed-loop", "best-of") or self.endpoint or self.pictures):
            raise UsageError(
                "--verification, --verifier, --blind and --descriptions are for our own models in the loop or best-of"
            )
        accepts = self.verification or ("separate" if self.controller == "vlm" else "controller")
        if is_exact and (self.blind or accepts != "separate"):
            raise UsageError("--descriptions detector is for a separate verifier that is not blind")
        if self.verifier and self.verification not in (None, "separate"):
            raise UsageError(f"--verifier is not used with --verification {self.verification}; leave one of them out")
        if self.verification == "none" and self.mode == "best-of":
            raise UsageError("--mode best-of cannot choose with --verification none")
        if self.mode == "open-loop" and self.budget != BudgetOptions():
            raise UsageError("--max-steps, --candidates and other limits are for the loop, not for --mode open-loop")
        if self.mode == "best-of":
            allowed = dataclasses.replace(
                BudgetOptions(), candidates=self.budget.candidates, max_nfe=self.budget.max_nfe
            )
            if self.budget != allowed:
                raise UsageError(
                    "--mode best-of takes --candidates and --max-nfe; the other limits are for closed-loop"
                )
            if self.budget.candidates < 2:
                raise UsageError("--mode best-of chooses among several images; give --candidates 2 or more")
        if self.size is not None:
            parse_size(self.size)
        if self.loading.reference_latents == "kept" and (self.endpoint or self.pictures or self.mode != "closed-loop"):
            where = "--endpoint" if self.endpoint else "--pictures" if self.pictures else f"--mode {self.mode}"
            raise UsageError(
                f"--reference-latents kept is for our own models in --mode closed-loop: with {where} there are no "
                "latents of references; leave it out"
            )
        if (self.endpoint or self.pictures) and (self.size is not None or self.loading != LoadOptions()):
            raise UsageError("--size, --dtype, --lora and --mesh are for our own models")
        if self.endpoint and self.pictures:
            raise UsageError("--endpoint and --pictures are two systems; give one of them")
        if self.pictures and self.mode != "one-shot":
            raise UsageError("--pictures scores existing images; leave --mode out")
        if self.endpoint and (self.steps is not None or self.guidance is not None):
            raise UsageError("--steps and --guidance are for our own models; endpoints have their own")
        if self.endpoint and self.mode != "one-shot" and self.controller != "endpoint":
            raise UsageError(f"--mode {self.mode} with --endpoint needs --controller endpoint, which plans for it")
        if (self.controller == "endpoint") != bool(self.controller_endpoint and self.controller_model):
            raise UsageError("--controller endpoint needs --controller-endpoint URL and --controller-model NAME")
        if len(self.picture_size) not in (0, 2) or len(self.controller_prices) not in (0, 2):
            raise UsageError("--picture-size must be height and width, and --controller-prices two prices")

    @property
    def title(self) -> str:
        """The system's name in messages and tables."""
        return self.model if self.pictures else f"{self.model}, {self.mode}"

    def check(self) -> None:
        """Raises ClvrError for errors that are found without loading a model."""
        from clvr_jax.pipelines.registry import resolve

        if not self.endpoint and not self.pictures:
            resolve(self.model)
            check_model_size(self._size, self.model)

    @property
    def _size(self) -> tuple[int, int] | None:
        return None if self.size is None else parse_size(self.size)

    def build(self, metadata: Sequence[UncheckedJSON] = ()) -> "System":
        """Loads the models and returns the system.

        Args:
          metadata: of the prompts, in the shapes world; the oracle needs it.
        Raises: ClvrError.
        """
        if self.pictures:
            from clvr_jax.evaluation.systems.external_images import external_images

            return external_images(self.pictures, self.model, self.seed)
        if self.endpoint:
            from clvr_jax.evaluation.systems.endpoints import endpoint_system

            controller = self._controller_model() if self.mode != "one-shot" else None
            return endpoint_system(
                self._image_model(), self.mode, self.budget.budget(), controller, self.in_flight, self.controller_tokens
            )
        from clvr_jax.evaluation.systems.models import one_shot, planned

        if self.mode == "one-shot":
            return one_shot(self.model, self.steps, self.guidance, size=self._size, **self.loading.arguments())
        if self.descriptions == "detector" and not metadata:
            raise UsageError(
                "--descriptions detector reads images of the shapes world only; it is for clvr eval shapes"
            )
        given, name = self._controller(metadata)
        return planned(
            self.model,
            self.mode,
            self.budget.budget(),
            given,
            name,
            verification=self.verification,
            verifier=self.verifier,
            is_blind=self.blind,
            has_exact_descriptions=self.descriptions == "detector",
            size=self._size,
            **self.loading.arguments(),
        )

    def _controller(self, metadata: Sequence[UncheckedJSON]) -> "tuple[Controller | None, str]":
        if self.controller == "vlm":
            return None, "vlm"
        if self.controller == "oracle":
            from clvr_jax.evaluation.systems.models import Oracle

            if not metadata:
                raise UsageError(
                    "--controller oracle reads images of the shapes world only; it is for clvr eval shapes"
                )
            return Oracle([dict(entry) for entry in metadata]), "oracle"
        from clvr_jax.providers.loop_roles import MAX_REPLY_TOKENS, REWRITE_PROMPT, ChatModelController

        model, tokens = self._controller_model(), self.controller_tokens or MAX_REPLY_TOKENS
        return ChatModelController(model, None if self.mode == "closed-loop" else REWRITE_PROMPT, tokens), model.name

    def _controller_model(self) -> "ChatModel":
        from clvr_jax.providers.endpoint import Endpoint, Prices
        from clvr_jax.providers.openai_chat import OpenAIChatModel

        return OpenAIChatModel(
            Endpoint(
                self.controller_model or "",
                self.controller_endpoint or "",
                self.controller_key_variable or None,
                max_in_flight=self.in_flight,
                prices=Prices(*self.controller_prices),
                max_seconds=self.controller_max_seconds,
            )
        )

    def _image_model(self) -> "ImageModel":
        from clvr_jax.providers.endpoint import Endpoint, Prices
        from clvr_jax.providers.openai_images import OpenAIImageModel

        return OpenAIImageModel(
            Endpoint(
                self.model,
                self.endpoint or "",
                self.key_variable or None,
                max_in_flight=self.in_flight,
                timeout=300.0,
                prices=Prices(picture=self.picture_price),
                max_seconds=self.endpoint_max_seconds,
                image_hosts=self.image_hosts,
            ),
            size=(self.picture_size[0], self.picture_size[1]) if self.picture_size else None,
            references=self.picture_references,
            response_format=self.picture_format,
            sends_seed=self.sends_seed,
        )


Systems = Annotated[SystemOptions, tyro.conf.arg(name="")]
