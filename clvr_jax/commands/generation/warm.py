"""`clvr warm`."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Common, Count, Flags, Result, prepare_jax
from clvr_jax.commands.generation.model_options import Loading, LoadOptions, check_model_size, parse_size
from clvr_jax.commands.generation.prompts import read_prompts
from clvr_jax.display.console import console, progress
from clvr_jax.errors import ClvrError, UsageError

if TYPE_CHECKING:
    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
    from clvr_jax.pipelines.flux2 import Flux2Pipeline
    from clvr_jax.pipelines.sdxl import SDXLPipeline
    from clvr_jax.programs import ProgramStore
    from clvr_jax.programs.function import MadeProgram

_MAX_REFERENCES = 64


@dataclass(frozen=True)
class Warm:
    """Compiles the programs of a model and stores them, so that later commands neither trace nor compile.

    Nothing is generated, unless --prompts is given. Later commands find the programs if they load the model in the same
    way, on the same kind of machine, with the same versions.
    """

    EXAMPLE: ClassVar = "clvr warm shapes-tiny --references 0-3 --text-tokens 64 96"

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A shipped name, a directory in diffusers layout, or a Hugging Face id."""
    sizes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HxW ...")] = ()
    """Heights and widths of images in pixels, such as 512x768, or one number for both. If not given, the model's own
    size."""
    references: Annotated[str, tyro.conf.arg(metavar="N|N-N")] = "0"
    """Numbers of images that a generated one refers to, such as 0-7 for a loop of eight steps; they have its size. If
    not given, 0: generated from text alone."""
    text_tokens: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Lengths of texts in tokens, prompt and replies of a loop together; each means all lengths that are padded to the
    same one. If not given, all lengths that the model reads."""
    steps: Count = None
    """Number of sampler steps; the model's own number if not given."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also run the closed loop for each line of this text file, as clvr generate does, which makes the programs of its
    controller and its verifier. If not given, only those of the image generator are made."""
    loading: Loading = field(default_factory=LoadOptions)
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        self.sizes_in_pixels()
        self.numbers_of_references()
        at_least_one("--steps", self.steps)
        if any(number < 1 for number in self.text_tokens):
            raise UsageError("--text-tokens: lengths are at least 1")

    def sizes_in_pixels(self) -> list[tuple[int, int]]:
        """Returns the sizes without duplicates. Raises: UsageError for an invalid one."""
        return list(dict.fromkeys(parse_size(size, "--sizes") for size in self.sizes))

    def numbers_of_references(self) -> range:
        """Returns the numbers of references. Raises: UsageError for an invalid range."""
        found = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", self.references)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= _MAX_REFERENCES:
            raise UsageError(
                f"--references {self.references}: give a number, or a range such as 0-7, up to {_MAX_REFERENCES}"
            )
        return range(first, last + 1)

    def run(self) -> Result:
        """Makes the programs."""
        for size in self.sizes_in_pixels():
            check_model_size(size, self.model)
        prompts = [] if self.prompts is None else read_prompts((), self.prompts, self.model)
        prepare_jax()
        from clvr_jax.pipelines.warming import make_programs, warm_calls
        from clvr_jax.processes import is_distributed
        from clvr_jax.programs import active_store, making_programs

        if is_distributed():
            raise ClvrError("clvr warm runs in one process: the programs of several processes are not stored")
        store = active_store()
        if store is None:
            raise UsageError("programs cannot be stored: CLVR_PROGRAMS is off, or its directory cannot be written")
        with console.status(f"loading {self.model}"):
            loop, pipe = self._load(is_loop=bool(prompts))
        calls = warm_calls(pipe, self.sizes_in_pixels(), self.numbers_of_references(), self.text_tokens)
        found: dict[str, MadeProgram] = {}

        def report(made: "MadeProgram") -> None:
            found.setdefault(made.key, made)

        with progress("programs", len(calls) + len(prompts)) as move:
            with making_programs(report):
                for done, call in enumerate(make_programs(pipe, calls, self.steps), start=1):
                    move(done, str(call))
            if loop is not None:
                with making_programs(report, is_run=True):
                    for done, prompt in enumerate(prompts, start=len(calls) + 1):
                        loop(prompt, max_steps=self.numbers_of_references()[-1] + 1)
                        move(done, prompt[:40])
        return self._result(list(found.values()), store)

    def _load(self, is_loop: bool) -> "tuple[ClosedLoopPipeline | None, Flux2Pipeline | SDXLPipeline]":
        from clvr_jax.commands.generation.memory_check import check_memory
        from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
        from clvr_jax.pipelines.registry import load_pipeline

        controller = self.model if is_loop else None
        size = next(iter(self.sizes_in_pixels()), None)
        arguments = check_memory(self.model, self.loading, size, (), controller).arguments()
        if not is_loop:
            return None, load_pipeline(self.model, **arguments)
        loop = ClosedLoopPipeline.from_pretrained(self.model, **arguments)
        if loop.controller is None:
            raise UsageError(
                f"--prompts: {self.model} has no controller/, so it does not run in the loop; leave it out"
            )
        return loop, loop.flux

    def _result(self, programs: "list[MadeProgram]", store: "ProgramStore") -> Result:
        made = [program for program in programs if program.is_new]
        lost = sum(not program.nbytes for program in programs)
        nbytes, held = sum(program.nbytes for program in programs), store.size()
        text = (
            f"{len(made)} programs made, {len(programs) - len(made)} existed, {nbytes / 2**20:.1f} MiB\n"
            f"{store.directory}: {held.programs} programs, {held.nbytes / 2**20:.1f} MiB"
        )
        if lost:
            text += f"\n{lost} programs cannot be stored on this backend"
        data = {
            "made": len(made),
            "existed": len(programs) - len(made),
            "bytes": nbytes,
            "not_stored": lost,
            "directory": str(store.directory),
            "directory_programs": held.programs,
            "directory_bytes": held.nbytes,
            "programs": [
                {"name": each.name, "new": each.is_new, "bytes": each.nbytes, "seconds": round(each.seconds, 3)}
                for each in programs
            ],
        }
        return Result(data, text)
