"""`clvr generate` and `clvr sample`."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

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
    from clvr_jax.reasoning.verification import Verification


@dataclass(frozen=True)
class Generate:
    """Generates an image in the closed loop: plan, generate, verify, correct."""

    EXAMPLE: ClassVar = (
        'clvr generate "a red circle left of a blue star and a green square at the bottom" --out out/first'
    )

    prompt: Prompt
    """Describe the image to generate."""
    model: str = "shapes-tiny"
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id."""
    verification: Literal["separate", "controller", "none"] = "separate"
    """Who accepts an image. separate: a verifier that sees the image without the conversation. controller: the
    controller, in its conversation. none: nobody, which is the ablation."""
    verifier: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """With --verification separate: verify with this model, a shipped name or a directory or Hugging Face id of a
    Qwen3-VL. If not given, the model's own controller verifies, in a new conversation for each image."""
    budget: Limits = field(default_factory=BudgetOptions)
    nfe: Count = None
    """Number of network evaluations (NFE) for each image; the model's own number if not given."""
    seed: int = 0
    """The same seed gives the same image."""
    out: Folder = None
    """Write trajectory.json, the images and index.html to this directory; a new one below out/ if not given."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--nfe", self.nfe)
        check_seed(self.seed)
        if self.verifier and self.verification != "separate":
            raise UsageError(f"--verifier is not asked with --verification {self.verification}; leave one of them out")

    def run(self) -> Result:
        """Draws and saves the trajectory."""
        from clvr_jax.outputs import check_folder, name_for

        unseen = _check_request(self.prompt, self.model)
        out = self.out or Path("out") / name_for(
            self.prompt, self.model, self.seed, self.budget, self.nfe, self.verification, self.verifier
        )
        check_folder(out)
        with console.status(f"loading {self.model}"):
            prepare_jax()
            from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

            pipe = ClosedLoopPipeline.from_pretrained(self.model, verifier=self.verifier)
        with console.status("thinking and drawing"):
            limits = dataclasses.asdict(self.budget)
            made = pipe(
                self.prompt,
                **limits,
                seed=self.seed,
                nfe=self.nfe,
                verification=self.verification,
                on_event=_show_event,
            )
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
            "unmet": None if trajectory.unmet is None else list(trajectory.unmet),
            "verification": None if trajectory.verification is None else trajectory.verification.to_dict(),
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
    """Generates an image in one shot, without the loop."""

    EXAMPLE: ClassVar = 'clvr sample "a yellow triangle" --seed 3 --out triangle.png'

    prompt: Prompt
    """Describe the image to generate."""
    model: str = "shapes-tiny"
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id."""
    steps: Count = None
    """Number of sampler steps; the model's own number if not given."""
    guidance: Guidance = None
    """Scale of classifier-free guidance; 1 switches it off, and the model's own scale is used if not given."""
    seed: int = 0
    """The same seed gives the same image."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Write the image to this file; a new one below out/ if not given."""
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
    from clvr_jax.reasoning.events import Chosen, Drawn, Finished, PlanVerified, Replied, RolledBack, Verified

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
        if event.step.left_out:
            replies = "reply" if event.step.left_out == 1 else f"{event.step.left_out} replies"
            console.print(f"[yellow]  the history is too long for the generator:[/] the oldest {replies} left out")
    elif isinstance(event, Verified):
        console.print(_verification_text(event.verification))
    elif isinstance(event, PlanVerified) and event.verification.unmet:
        console.print(f"[yellow]  the plan misses:[/] {escape('; '.join(event.verification.unmet))}")
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


def _verification_text(verification: "Verification") -> Text:
    """One line for each requirement: whether it is met, how sure the verifier is, and on what evidence."""
    text = Text(f"  {verification.description}" if verification.description else "")
    for each in verification.requirements:
        mark, style = {True: ("met", "green"), False: ("unmet", "yellow"), None: ("no answer", "red")}[each.met]
        sure = "" if each.probability is None else f" {each.probability:.2f}"
        text.append(f"\n    {mark:>5}{sure}  ", style)
        text.append(each.text, "bold")
        if each.evidence:
            text.append(f"  ({each.evidence})", "dim")
    return text
