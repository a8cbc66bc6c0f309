"""`clvr eval verifier`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from clvr_jax.arguments import at_least_one, check_seed
from clvr_jax.commands.common import Common, Directory, Flags, Result, prepare_jax, results_directory
from clvr_jax.commands.eval.judge_options import JudgeOptions
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    from clvr_jax.evaluation.verifier.cases import Case
    from clvr_jax.evaluation.verifier.report import VerifierResults
    from clvr_jax.files.json_input import JSON
    from clvr_jax.reasoning.verification.model_verifier import ModelVerifier

_DEFAULT_MODEL = "shapes-tiny"


@dataclass(frozen=True, kw_only=True)
class _VerifierOptions:
    """Options for what is verified, and for the model that verifies."""

    out: Directory = None
    """Write results.json and verifier.md to this directory, at the end of a complete run. If not given, the table is
    only printed."""
    model: str = _DEFAULT_MODEL
    """Verify with this model: a shipped name, a directory with controller/, or a directory or Hugging Face id of a
    Qwen3-VL."""
    mode: Literal["describe", "ask"] | None = None
    """How the model verifies. describe: it describes the image before it sees a requirement, then compares. ask: it
    answers whether the image meets each requirement. If not given, describe for models that were trained for the loop,
    and ask for others."""
    requirements: Literal["derived", "exact"] = "derived"
    """Where the requirements come from. derived: the verifier derives them from each prompt. exact: it receives those
    of the shapes world, so that only its perception is measured."""
    generators: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Verify images of these generators as well: shipped names such as shapes-tiny shapes-tiny-sft shapes-tiny-base, or
    directories. Each generates one image for each prompt. None if not given."""
    images: Directory = None
    """Verify the labeled images of this directory as well, with a line {"image", "prompt", "label"} for each in
    labels.jsonl. None if not given."""
    count: int = 300
    """Number of prompts of the shapes world, and of images of each kind; 0 verifies only the images of --images."""
    seed: int = 0
    """The same seed gives the same prompts, renderings and generated images."""
    batch_size: int = 64
    """Verify this many images together; it changes only speed and memory."""
    common: Flags = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class EvalVerifier(JudgeOptions, _VerifierOptions):
    """Measures a verifier: which right images it rejects, and which wrong images and controls it accepts.

    The images are renderings of the shapes world with exactly one mistake, controls that must be rejected (noise, a
    blank canvas, the image of another prompt), and, if you name them, images of generators and labeled images of your
    own.
    """

    EXAMPLE: ClassVar = (
        "clvr eval verifier --model shapes-tiny --generators shapes-tiny shapes-tiny-sft shapes-tiny-base "
        "--out out/verifier"
    )

    judge: str = ""
    """Verify with this model behind --judge-url, in place of --model."""

    def __post_init__(self) -> None:
        self.check_judge()
        check_seed(self.seed)
        at_least_one("--batch-size", self.batch_size)
        if self.judge and not self.judge_url:
            raise UsageError(f"--judge needs --judge-url URL; for a model on this machine give --model {self.judge}")
        if self.judge and self.model != _DEFAULT_MODEL:
            raise UsageError("--model and --judge name two verifiers; give one of them")
        if self.count < 0 or (self.count == 0 and not self.images):
            raise UsageError(f"--count must be at least 1, or 0 with --images, got {self.count}")
        if self.count == 0 and self.generators:
            raise UsageError("--generators need prompts; give --count 1 or more")
        if len(set(self.generators)) < len(self.generators):
            raise UsageError("--generators names each generator once")

    def run(self) -> Result:
        """Prepares and verifies the images, and writes the results if there is a directory for them."""
        prepare_jax()
        from clvr_jax.evaluation.verifier.image_directory import labeled_images
        from clvr_jax.evaluation.verifier.report import rich_results
        from clvr_jax.evaluation.verifier.run import BENCHMARK
        from clvr_jax.pipelines.registry import resolve

        images = labeled_images(self.images) if self.images else []
        for name in self.generators:
            resolve(name)
        with results_directory(self.out, BENCHMARK):
            results = self._evaluate(images)
        data = {key: value for key, value in results.items() if key != "cases"}
        return Result(data if self.out is None else {**data, "out": str(self.out)}, rich_results(results))

    def _evaluate(self, images: "list[Case]") -> "VerifierResults":
        """Verifies the images; returns the content of results.json."""
        from functools import partial

        from clvr_jax.evaluation.verifier.generated import load_generator
        from clvr_jax.evaluation.verifier.run import evaluate

        verifier, settings = self._verifier()
        return evaluate(
            verifier,
            self.out,
            count=self.count,
            seed=self.seed,
            generators={name: partial(load_generator, name) for name in self.generators},
            images=images,
            settings=settings,
            batch_size=self.batch_size,
            exact_requirements=self.requirements == "exact",
        )

    def _verifier(self) -> "tuple[ModelVerifier, dict[str, JSON]]":
        """Returns the verifier and its identity."""
        if self.judge:
            from clvr_jax.providers.endpoint import Endpoint, Prices
            from clvr_jax.providers.openai_chat import OpenAIChatModel
            from clvr_jax.reasoning.verification.model_verifier import ModelVerifier

            endpoint = Endpoint(
                self.judge,
                self.judge_url or "",
                self.judge_key_variable or None,
                max_in_flight=self.judge_in_flight,
                prices=Prices(*self.judge_prices),
                max_seconds=self.judge_max_seconds,
            )
            mode = self.mode or "ask"
            verifier = ModelVerifier(OpenAIChatModel(endpoint), mode, max_tokens=self.judge_tokens or 512)
            return verifier, {"model": endpoint.name, "revision": self.judge_revision, "mode": mode}
        from clvr_jax.merging.digests import Digests
        from clvr_jax.pipelines.qwen3_vl import Verifier
        from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory

        directory, _ = controller_directory(self.model)
        loaded = Verifier.from_pretrained(self.model, mode=self.mode)
        digest = Digests({"verifier": directory}).finish()["verifier"][:16]
        return loaded, {"model": self.model, "weights": digest, "mode": self.mode}
