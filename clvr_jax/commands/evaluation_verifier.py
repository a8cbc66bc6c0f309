"""`clvr eval verifier`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from clvr_jax.arguments import at_least_one, check_seed
from clvr_jax.commands.common import Common, Flags, Folder, Result, prepare_jax
from clvr_jax.commands.judge_options import JudgeOptions
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    from clvr_jax.reasoning.verification import ModelVerifier

_DEFAULT_MODEL = "shapes-tiny"


@dataclass(frozen=True, kw_only=True)
class _VerifierOptions:
    """What is verified, and by which model of ours."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Directory for results.json and verifier.md; they are written at the end of a complete run."""
    model: str = _DEFAULT_MODEL
    """Model that verifies: a shipped model, a directory with controller/, or a Qwen3-VL (directory or hub id)."""
    mode: Literal["describe", "ask"] | None = None
    """describe: describe the image before a requirement is seen, then compare. ask: ask each requirement of the image.
    If not given, describe for models that were trained for the loop and ask for others."""
    requirements: Literal["derived", "exact"] = "derived"
    """derived: the verifier derives the requirements from each prompt. exact: it is given those of the shapes world, so
    that only what it sees is measured."""
    generators: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Generators whose images are verified too: shipped models such as shapes-tiny shapes-tiny-sft shapes-tiny-base, or
    directories; each generates one image for each prompt. None if not given."""
    images: Folder = None
    """Directory of labeled images to verify too, with a line {"image", "prompt", "label"} for each in labels.jsonl."""
    count: int = 300
    """Number of prompts of the shapes world, and so of images of each kind; 0 verifies those of --images only."""
    seed: int = 0
    """The same seed gives the same prompts, renderings and generated images."""
    batch_size: int = 64
    """Images that are verified together; it changes speed and memory only."""
    common: Flags = field(default_factory=Common)


@dataclass(frozen=True, kw_only=True)
class EvalVerifier(JudgeOptions, _VerifierOptions):
    """Measures a verifier: which right images it rejects, which wrong images it accepts, and whether it looks at all.

    The images are renderings of the shapes world with exactly one mistake, controls that must be rejected (noise, a
    blank canvas, the image of another prompt), and, if you name them, images of generators and labeled images of your
    own.
    """

    EXAMPLE: ClassVar = (
        "clvr eval verifier --model shapes-tiny --generators shapes-tiny shapes-tiny-sft shapes-tiny-base "
        "--out out/verifier"
    )

    judge: str = ""
    """Model behind --judge-url that verifies, in place of --model."""

    def __post_init__(self) -> None:
        self.check_judge()
        check_seed(self.seed)
        at_least_one("--batch-size", self.batch_size)
        if self.judge and not self.judge_url:
            raise UsageError(f"--judge goes with --judge-url URL; a model of ours is --model {self.judge}")
        if self.judge and self.model != _DEFAULT_MODEL:
            raise UsageError("--model and --judge name two verifiers; give one of them")
        if self.count < 0 or (self.count == 0 and not self.images):
            raise UsageError(f"--count must be at least 1, or 0 with --images, got {self.count}")
        if self.count == 0 and self.generators:
            raise UsageError("--generators need prompts; give --count 1 or more")
        if len(set(self.generators)) < len(self.generators):
            raise UsageError("--generators names each generator once")

    def run(self) -> Result:
        """Makes the images, has them verified, and writes results.json and verifier.md."""
        prepare_jax()
        from functools import partial

        from clvr_jax.evaluation.verifier.generated import load_generator
        from clvr_jax.evaluation.verifier.image_directory import labeled_images
        from clvr_jax.evaluation.verifier.report import rich_results
        from clvr_jax.evaluation.verifier.run import check_out, evaluate
        from clvr_jax.outputs import check_folder
        from clvr_jax.pipelines.registry import resolve

        check_folder(self.out)
        check_out(self.out)
        images = labeled_images(self.images) if self.images else []
        for name in self.generators:
            resolve(name)
        verifier, settings = self._verifier()
        results = evaluate(
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
        data = {key: value for key, value in results.items() if key != "cases"}
        return Result({**data, "out": str(self.out)}, rich_results(results))

    def _verifier(self) -> "tuple[ModelVerifier, dict[str, Any]]":
        """The verifier, and what identifies it."""
        if self.judge:
            from clvr_jax.providers.endpoint import Endpoint, Prices
            from clvr_jax.providers.openai_chat import OpenAIVisionLanguageModel
            from clvr_jax.reasoning.verification import ModelVerifier

            endpoint = Endpoint(
                self.judge,
                self.judge_url or "",
                self.judge_key_variable or None,
                max_in_flight=self.judge_in_flight,
                prices=Prices(*self.judge_prices),
            )
            mode = self.mode or "ask"
            verifier = ModelVerifier(OpenAIVisionLanguageModel(endpoint), mode, max_tokens=self.judge_tokens or 512)
            return verifier, {"model": endpoint.name, "revision": self.judge_revision, "mode": mode}
        from clvr_jax.merging.digests import Digests
        from clvr_jax.pipelines.verifier import Verifier, controller_directory

        directory, _ = controller_directory(self.model)
        loaded = Verifier.from_pretrained(self.model, mode=self.mode)
        digest = Digests({"verifier": directory}).finish()["verifier"][:16]
        return loaded, {"model": self.model, "weights": digest, "mode": self.mode}
