"""`clvr generate` and `clvr sample`."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro
from rich.markup import escape
from rich.text import Text

from clvr_jax.arguments import at_least_one, check_guidance, check_seed
from clvr_jax.commands.budget import BudgetOptions, Limits
from clvr_jax.commands.common import Common, Count, Flags, Folder, Guidance, Prompt, Result, prepare_jax
from clvr_jax.console import console
from clvr_jax.errors import ClvrError, UsageError

if TYPE_CHECKING:
    from clvr_jax.reasoning.events import Event


@dataclass(frozen=True)
class Generate:
    """Draws a picture through the closed loop: plan, draw, look, correct."""

    EXAMPLE: ClassVar = (
        'clvr generate "a red circle left of a blue star and a green square at the bottom" --out out/first'
    )

    prompt: Prompt
    """What to draw."""
    model: str = "shapes-tiny"
    """Shipped model, a folder in diffusers layout or a Hugging Face id."""
    budget: Limits = field(default_factory=BudgetOptions)
    nfe: Count = None
    """Network evaluations of each drawing; the model's own number if not given."""
    seed: int = 0
    """The same seed gives the same picture."""
    out: Folder = None
    """Folder for trajectory.json, the pictures and index.html; below out/ if not given."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--nfe", self.nfe)
        check_seed(self.seed)

    def run(self) -> Result:
        """Draws and saves the trajectory."""
        from clvr_jax.outputs import check_folder, name_for

        unseen = _check_request(self.prompt, self.model)
        out = self.out or Path("out") / name_for(self.prompt, self.model, self.seed, self.budget, self.nfe)
        check_folder(out)
        with console.status(f"loading {self.model}"):
            prepare_jax()
            from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

            pipe = ClosedLoopPipeline.from_pretrained(self.model)
        with console.status("thinking and drawing"):
            limits = dataclasses.asdict(self.budget)
            made = pipe(self.prompt, **limits, seed=self.seed, nfe=self.nfe, on_event=_show_event)
        trajectory = made.trajectory
        page = trajectory.save(out) / "index.html"
        if trajectory.image is None:
            raise ClvrError(
                f"no picture was drawn ({trajectory.outcome}: {trajectory.error}); {page} shows what happened"
            )
        data = {
            "prompt": self.prompt,
            "model": self.model,
            "seed": self.seed,
            "outcome": trajectory.outcome,
            "unmet": list(trajectory.verdict.unmet) if trajectory.verdict else None,
            "drawings": len(trajectory.drawings),
            "nfe": made.nfe,
            "seconds": round(made.seconds, 3),
            "unseen_words": unseen,
            "out": str(out),
            "image": str(out / f"step_{trajectory.best:02d}.png"),
            "page": str(page),
        }
        return Result(data, str(page))


@dataclass(frozen=True)
class Sample:
    """Draws a picture in one shot, without the loop."""

    EXAMPLE: ClassVar = 'clvr sample "a yellow triangle" --seed 3 --out triangle.png'

    prompt: Prompt
    """What to draw."""
    model: str = "shapes-tiny"
    """Shipped model, a folder in diffusers layout or a Hugging Face id."""
    steps: Count = None
    """Sampler steps; the model's own number if not given."""
    guidance: Guidance = None
    """Classifier-free guidance, 1 switches it off; the model's own if not given."""
    seed: int = 0
    """The same seed gives the same picture."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """The picture; below out/ if not given."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--steps", self.steps)
        check_guidance(self.guidance)
        check_seed(self.seed)
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise UsageError(f"--out {self.out}: pictures are written as PNG; end the name in .png")

    def run(self) -> Result:
        """Draws and writes the picture."""
        from clvr_jax.outputs import check_file, name_for

        unseen = _check_request(self.prompt, self.model)
        name = name_for(self.prompt, self.model, self.seed, self.steps, self.guidance) + ".png"
        out = check_file(self.out or Path("out") / name)
        with console.status(f"drawing with {self.model}"):
            prepare_jax()
            from clvr_jax.files import write_atomically
            from clvr_jax.pipelines.registry import load_pipeline
            from clvr_jax.reasoning.images import encode_png

            pipe = load_pipeline(self.model)
            began = time.monotonic()
            made = pipe(self.prompt, num_inference_steps=self.steps, guidance_scale=self.guidance, seed=self.seed)
            seconds = time.monotonic() - began
            write_atomically(out, encode_png(made.images[0]))
        data = {
            "prompt": self.prompt,
            "model": self.model,
            "seed": self.seed,
            "nfe": made.nfe,
            "seconds": round(seconds, 3),
            "unseen_words": unseen,
            "image": str(out),
        }
        return Result(data, str(out))


def _check_request(prompt: str, model: str) -> list[str]:
    """Checks what needs no model; warns of words the model never saw and returns them."""
    from clvr_jax.data.text import check_prompt
    from clvr_jax.pipelines.world import unseen_words

    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not valid UTF-8 text") from error
    check_prompt(prompt)
    unseen = unseen_words(model, prompt)
    if unseen:
        listed = ", ".join(unseen[:8]) + (" ..." if len(unseen) > 8 else "")
        console.print(f"[yellow]warning:[/] {model} never saw: {listed}")
    return unseen


def _show_event(event: "Event") -> None:
    """Prints what the loop does as it does it."""
    from clvr_jax.reasoning.actions import parse, strip_action, unmet_span
    from clvr_jax.reasoning.events import Chosen, Drawn, Finished, Replied, RolledBack

    if isinstance(event, Replied) and event.error:
        console.print(f"[yellow]  not understood:[/] {escape(event.error)}")
    elif isinstance(event, Replied):
        text = Text("  " + strip_action(event.text))
        span = unmet_span(text.plain)
        if span:
            met = parse(event.text, has_picture=True).unmet == ()
            text.stylize("bold green" if met else "bold yellow", *span)
        console.print(text)
    elif isinstance(event, Drawn):
        again = f", attempt {event.step.redraw + 1}" if event.step.redraw else ""
        console.print(f"[bold]step {event.number}[/]  {event.step.nfe} NFE  {event.step.seconds:.1f} s{again}")
    elif isinstance(event, Chosen):
        console.print(f"  step {event.number} goes on, of {len(event.among)} candidates")
    elif isinstance(event, RolledBack):
        console.print(f"[yellow]  step {event.number} is worse than step {event.to}: back to step {event.to}[/]")
    elif isinstance(event, Finished):
        color = "green" if event.trajectory.outcome == "accepted" else "yellow"
        spent = (
            f"{len(event.trajectory.drawings)} drawings, {event.trajectory.nfe} NFE, {event.trajectory.seconds:.1f} s"
        )
        console.print(f"[bold {color}]{event.trajectory.outcome}[/]  {spent}")
