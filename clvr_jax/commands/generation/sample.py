"""`clvr sample`."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from clvr_jax.arguments import at_least_one, check_guidance
from clvr_jax.commands.common import Common, Count, Flags, Guidance, Result, prepare_jax
from clvr_jax.commands.generation.model_options import ImageOptions, Images, Loading, LoadOptions
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
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from clvr_jax.pipelines.flux2 import Flux2Pipeline
    from clvr_jax.pipelines.sdxl import SDXLPipeline


@dataclass(frozen=True)
class Sample:
    """Generates an image in one shot, without the loop."""

    EXAMPLE: ClassVar = 'clvr sample "a yellow triangle" --seed 3 --out triangle.png'

    prompt: OnePrompt = ()
    """Describe the image to generate, in quotes; or give --prompts."""
    prompts: PromptFile = None
    """Generate an image for each line of this text file, each in a file of its own in --out."""
    num_images: int = 1
    """Generate this many images of each prompt, with the seeds SEED, SEED + 1 and so on, each in a file of its own in
    --out."""
    model: str = "shapes-tiny"
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id."""
    images: Images = field(default_factory=ImageOptions)
    loading: Loading = field(default_factory=LoadOptions)
    steps: Count = None
    """Number of sampler steps; the model's own number if not given."""
    guidance: Guidance = None
    """Scale of classifier-free guidance; 1 switches it off, and the model's own scale is used if not given."""
    seed: int = 0
    """The same seed gives the same image."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png|DIR")] = None
    """Write the image to this file, or several images into this directory; a new one below out/ if not given."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        check_prompt_options(self.prompt, self.prompts, self.num_images, self.seed)
        at_least_one("--steps", self.steps)
        check_guidance(self.guidance)
        if self.loading.reference_latents == "kept":
            raise UsageError("--reference-latents kept: clvr sample refers to your own images only; leave it out")
        is_png = self.out is None or self.out.suffix.lower() == ".png"
        if not is_png and self.prompts is None and self.num_images == 1:
            raise UsageError(f"--out {self.out}: images are written as PNG; end the name in .png")

    def run(self) -> Result:
        """Generates and writes all images."""
        from clvr_jax.processes import check_same, run_on_all

        tasks, files, given = run_on_all(self._check)
        check_same("arguments, prompts or images", digest_of(dataclasses.replace(self, out=None), tasks, given))
        with console.status(f"generating with {self.model}"):
            pipe = run_on_all(lambda: self._load(given))
            results = [self._sample(pipe, task, given, file) for task, file in zip(tasks, files, strict=True)]
        data = {"results": results, "out": str(files[0].parent)} if self._is_directory else results[0]
        return Result(data, "\n".join(str(file) for file in files))

    @property
    def _is_directory(self) -> bool:
        """Whether --out is a directory of several images, and not one file."""
        return self.prompts is not None or self.num_images > 1

    def _check(self) -> "tuple[list[ImageTask], list[Path], list[np.ndarray]]":
        """Returns the images to generate, their files and the given images, after all checks that need no weights."""
        from clvr_jax.files.output_paths import check_directory, check_file
        from clvr_jax.processes import is_host0

        tasks = image_tasks(read_prompts(self.prompt, self.prompts, self.model), self.num_images, self.seed)
        out = self.out or Path("out") / (self._name(tasks) + ("" if self._is_directory else ".png"))
        if self._is_directory and self.out is not None and self.out.suffix.lower() == ".png":
            raise UsageError(f"--out {self.out}: {len(tasks)} images need a directory; give its name")
        if is_host0():
            (check_directory if self._is_directory else check_file)(out)
        files = [out / f"{task.name}.png" for task in tasks] if self._is_directory else [out]
        return tasks, files, self.images.check(self.model)

    def _load(self, given: "list[np.ndarray]") -> "Flux2Pipeline | SDXLPipeline":
        prepare_jax()
        from clvr_jax.commands.generation.memory_check import check_memory
        from clvr_jax.pipelines.registry import load_pipeline

        loading = check_memory(self.model, self.loading, self.images.height_and_width(), given)
        return load_pipeline(self.model, **loading.arguments())

    def _sample(
        self, pipe: "Flux2Pipeline | SDXLPipeline", task: ImageTask, given: "list[np.ndarray]", file: Path
    ) -> dict[str, object]:
        """Generates and writes one image; returns the result."""
        from clvr_jax.files.atomic_io import write_atomically
        from clvr_jax.files.image_io import encode_png
        from clvr_jax.pipelines.world import unseen_words
        from clvr_jax.processes import broadcast_from_host0

        began = time.monotonic()
        output = pipe(
            task.prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            seed=task.seed,
            **self.images.arguments(given),
        )
        seconds = time.monotonic() - began
        broadcast_from_host0(lambda: write_atomically(file, encode_png(output.images[0])))
        return {
            "prompt": task.prompt,
            "model": self.model,
            "seed": task.seed,
            "nfe": output.nfe,
            "seconds": round(seconds, 3),
            "unseen_words": unseen_words(self.model, task.prompt),
            "image": str(file),
        }

    def _name(self, tasks: list[ImageTask]) -> str:
        """Returns the default name of the output, which depends on all options that affect the images."""
        from clvr_jax.files.output_paths import output_name

        settings = [self.model, self.seed, self.steps, self.guidance]
        more = (self.images, self.loading, [(task.prompt, task.seed) for task in tasks[1:]])
        if more != (ImageOptions(), LoadOptions(), []):
            settings.append(more)
        return output_name(tasks[0].prompt, *settings)
