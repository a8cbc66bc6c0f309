"""`clvr sample`."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from clvr_jax.arguments import at_least_one, check_guidance
from clvr_jax.commands.common import Common, Count, Flags, Guidance, Result, prepare_jax
from clvr_jax.commands.model_options import ImageOptions, Images, Loading, LoadOptions
from clvr_jax.commands.prompts import (
    OnePrompt,
    PromptFile,
    Wanted,
    check_given,
    read_prompts,
    wanted_images,
)
from clvr_jax.console import console
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


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
        check_given(self.prompt, self.prompts, self.num_images, self.seed)
        at_least_one("--steps", self.steps)
        check_guidance(self.guidance)
        is_png = self.out is None or self.out.suffix.lower() == ".png"
        if not is_png and self.prompts is None and self.num_images == 1:
            raise UsageError(f"--out {self.out}: images are written as PNG; end the name in .png")

    def run(self) -> Result:
        """Generates and writes every image that is wanted."""
        from clvr_jax.outputs import check_file, check_folder

        wanted = wanted_images(read_prompts(self.prompt, self.prompts, self.model), self.num_images, self.seed)
        is_directory = self.prompts is not None or self.num_images > 1
        name = self._name(wanted)
        if not is_directory:
            files = [check_file(self.out or Path("out") / f"{name}.png")]
        else:
            if self.out is not None and self.out.suffix.lower() == ".png":
                raise UsageError(f"--out {self.out}: {len(wanted)} images need a directory; give its name")
            out = check_folder(self.out or Path("out") / name)
            files = [out / f"{each.name}.png" for each in wanted]
        given = self.images.check(self.model)
        with console.status(f"generating with {self.model}"):
            prepare_jax()
            from clvr_jax.commands.memory_check import check_memory
            from clvr_jax.pipelines.registry import load_pipeline

            check_memory(self.model, self.loading)
            pipe = load_pipeline(self.model, **self.loading.arguments())
            results = [self._sample(pipe, each, given, file) for each, file in zip(wanted, files, strict=True)]
        data = {"results": results, "out": str(files[0].parent)} if is_directory else results[0]
        return Result(data, "\n".join(str(file) for file in files))

    def _sample(self, pipe: Any, wanted: Wanted, given: "list[np.ndarray]", file: Path) -> dict[str, Any]:
        """Generates one image and writes it; the result as data."""
        from clvr_jax.files import write_atomically
        from clvr_jax.image_io import encode_png
        from clvr_jax.pipelines.world import unseen_words

        began = time.monotonic()
        made = pipe(
            wanted.prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            seed=wanted.seed,
            **self.images.arguments(given),
        )
        seconds = time.monotonic() - began
        write_atomically(file, encode_png(made.images[0]))
        return {
            "prompt": wanted.prompt,
            "model": self.model,
            "seed": wanted.seed,
            "nfe": made.nfe,
            "seconds": round(seconds, 3),
            "unseen_words": unseen_words(self.model, wanted.prompt),
            "image": str(file),
        }

    def _name(self, wanted: list[Wanted]) -> str:
        """The name of the output if none is given: it depends on all that decides about the images."""
        from clvr_jax.outputs import name_for

        settings = [self.model, self.seed, self.steps, self.guidance]
        more = (self.images, self.loading, [(each.prompt, each.seed) for each in wanted[1:]])
        if more != (ImageOptions(), LoadOptions(), []):
            settings.append(more)
        return name_for(wanted[0].prompt, *settings)
