"""`clvr generate`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Common, Count, Directory, Flags, Result, prepare_jax
from clvr_jax.commands.generation.budget import BudgetOptions, Limits
from clvr_jax.commands.generation.loop_events import show_event
from clvr_jax.commands.generation.model_options import (
    Control,
    ControllerOptions,
    ImageOptions,
    Images,
    Loading,
    LoadOptions,
)
from clvr_jax.commands.generation.prompts import (
    ImageTask,
    OnePrompt,
    PromptFile,
    check_prompt_options,
    digest_of,
    image_tasks,
    read_prompts,
)
from clvr_jax.display.console import console
from clvr_jax.errors import ClvrError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline


@dataclass(frozen=True)
class Generate:
    """Generates an image in the closed loop: plan, generate, verify, correct."""

    EXAMPLE: ClassVar = (
        'clvr generate "a red circle left of a blue star and a green square at the bottom" --out out/first'
    )

    prompt: OnePrompt = ()
    """Describe the image to generate, in quotes; or give --prompts."""
    prompts: PromptFile = None
    """Generate an image for each line of this text file, each in a directory of its own below --out."""
    num_images: int = 1
    """Generate this many images of each prompt, with the seeds SEED, SEED + 1 and so on, each in a directory of its own
    below --out."""
    model: str = "shapes-tiny"
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id."""
    control: Control = field(default_factory=ControllerOptions)
    verification: Literal["separate", "controller", "none"] = "separate"
    """Who accepts an image. separate: a verifier that sees the image without the conversation. controller: the
    controller, in its conversation. none: nobody, which is the ablation."""
    verifier: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With --verification separate: verify with this model, a shipped name or a directory or Hugging Face id of a
    Qwen3-VL. If not given, the controller verifies, in a new conversation for each image."""
    read_text: bool = False
    """With --verification separate: read the text in images by OCR. Every quoted text of the prompt is a requirement
    `the image says "..."`, which is met if it is read (pip install 'clvr-jax[ocr]')."""
    images: Images = field(default_factory=ImageOptions)
    loading: Loading = field(default_factory=LoadOptions)
    budget: Limits = field(default_factory=BudgetOptions)
    nfe: Count = None
    """Number of network evaluations (NFE) for each image; the model's own number if not given."""
    seed: int = 0
    """The same seed gives the same image."""
    out: Directory = None
    """Write trajectory.json, the images and index.html to this directory; a new one below out/ if not given."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        check_prompt_options(self.prompt, self.prompts, self.num_images, self.seed)
        at_least_one("--nfe", self.nfe)
        if self.verifier and self.verification != "separate":
            raise UsageError(f"--verifier is not used with --verification {self.verification}; leave one of them out")
        if self.read_text and self.verification != "separate":
            raise UsageError(f"--read-text is not used with --verification {self.verification}; leave one of them out")

    def run(self) -> Result:
        """Runs the loop for every image, and saves each trajectory."""
        from clvr_jax.processes import check_same, run_on_all

        tasks, given = run_on_all(self._check)
        out = self.out or Path("out") / self._name(tasks)
        check_same("arguments, prompts or images", digest_of(dataclasses.replace(self, out=None), tasks, given))
        with console.status(f"loading {self.model}"):
            pipe = run_on_all(lambda: self._load(given))
        if len(tasks) == 1:
            data, error = self._generate(pipe, tasks[0], given, out)
            if error:
                raise ClvrError(error)
            return Result(data, str(data["page"]))
        results, errors = [], []
        for task in tasks:
            console.print(f"[bold]{task.name}[/]  seed {task.seed}", highlight=False)
            data, error = self._generate(pipe, task, given, out / task.name)
            results.append(data)
            errors += [error] if error else []
        for error in errors:
            console.print(f"[yellow]warning:[/] {error}", highlight=False)
        if len(errors) == len(tasks):
            raise ClvrError(f"{out}: none of the {len(tasks)} trajectories has an image")
        return Result({"results": results, "out": str(out)}, "\n".join(str(data["page"]) for data in results))

    def _check(self) -> "tuple[list[ImageTask], list[np.ndarray]]":
        """Returns the images to generate and the given images, after all checks that need no weights."""
        from clvr_jax.files.output_paths import check_output_directory
        from clvr_jax.processes import is_host0

        tasks = image_tasks(read_prompts(self.prompt, self.prompts, self.model), self.num_images, self.seed)
        if is_host0():
            check_output_directory(self.out or Path("out") / self._name(tasks))
        given = self.images.check(self.model)
        self.control.check(self.model)
        if self.read_text:
            from clvr_jax.providers.ocr import RapidTextReader

            RapidTextReader()  # before a model is loaded, and possibly fetched
        return tasks, given

    def _load(self, given: "list[np.ndarray]") -> "ClosedLoopPipeline":
        prepare_jax()
        from clvr_jax.commands.generation.memory_check import check_memory
        from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

        controller = None if self.control.controller_url else self.control.controller or self.model
        size = self.images.height_and_width()
        loading = check_memory(
            self.model, self.loading, size, given, controller, self.verifier, self.control.prefix_cache
        )
        roles = self.control.arguments(self.verifier, self.verification == "separate")
        pipe = ClosedLoopPipeline.from_pretrained(self.model, **loading.arguments(), **roles)
        if self.read_text and pipe.verifier is not None:
            from clvr_jax.providers.ocr import RapidTextReader
            from clvr_jax.reasoning.verification.text_in_images import TextVerifier

            pipe.verifier = TextVerifier(pipe.verifier, RapidTextReader())
        return pipe

    def _generate(
        self, pipe: "ClosedLoopPipeline", task: ImageTask, given: "list[np.ndarray]", out: Path
    ) -> tuple[dict[str, object], str | None]:
        """Runs the loop once and saves the trajectory; returns the result, and an error if it has no image."""
        from clvr_jax.pipelines.world import unseen_words
        from clvr_jax.processes import broadcast_from_host0

        with console.status("generating"):
            output = pipe(
                task.prompt,
                **dataclasses.asdict(self.budget),
                seed=task.seed,
                nfe=self.nfe,
                verification=self.verification,
                on_event=show_event,
                **self.images.arguments(given),
            )
        trajectory = output.trajectory
        page = Path(broadcast_from_host0(lambda: str(trajectory.save(out) / "index.html")))
        best = trajectory.best
        error = None
        if best is None:
            error = f"no image was generated ({trajectory.outcome}: {trajectory.error}); {page} shows what happened"
        return {
            "prompt": task.prompt,
            "model": self.model,
            "seed": task.seed,
            "outcome": trajectory.outcome,
            "unmet": None if trajectory.unmet is None else list(trajectory.unmet),
            "verification": None if trajectory.verification is None else trajectory.verification.to_dict(),
            "drawings": len(trajectory.generated),
            "nfe": output.nfe,
            "seconds": round(output.seconds, 3),
            "unseen_words": unseen_words(self.model, task.prompt),
            "adapted": list(getattr(pipe.controller, "adapted", ())),
            "out": str(out),
            "image": None if best is None else str(out / f"step_{best:02d}.png"),
            "page": str(page),
        }, error

    def _name(self, tasks: list[ImageTask]) -> str:
        """Returns the default name of the output directory, which depends on all options that affect the images."""
        from clvr_jax.files.output_paths import output_name

        settings = [self.model, self.seed, self.budget, self.nfe, self.verification, self.verifier]
        more = (self.control, self.images, self.loading, [(task.prompt, task.seed) for task in tasks[1:]])
        if more != (ControllerOptions(), ImageOptions(), LoadOptions(), []):
            settings.append(more)
        if self.read_text:
            settings.append("read_text")
        return output_name(tasks[0].prompt, *settings)
