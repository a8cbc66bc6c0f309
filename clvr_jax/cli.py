"""`clvr ...`: parses, calls one function, prints.

Exit codes: 0 done, 1 failed, 2 a command line that makes no sense, 130 interrupted. Progress and errors go to stderr,
results to stdout. What a command needs is imported when it runs, so that `clvr --help` is quick.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

import tyro
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from clvr_jax.arguments import at_least_one, check_guidance, check_seed, read_arguments
from clvr_jax.console import console, progress
from clvr_jax.errors import ClvrError, UsageError

if TYPE_CHECKING:
    from clvr_jax.reasoning.events import Event
    from clvr_jax.training.recipes import Recipe


@dataclass(frozen=True)
class Result:
    """What a command has to say: `data` with --json, else `text`."""

    data: dict[str, Any]
    text: RenderableType


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """Show the traceback of an error."""


Flags = Annotated[Common, tyro.conf.arg(name="")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Guidance = Annotated[float | None, tyro.conf.arg(metavar="G")]
Prompt = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]


@dataclass(frozen=True)
class Generate:
    """Draws a picture through the closed loop: plan, draw, look, correct."""

    EXAMPLE: ClassVar = (
        'clvr generate "a red circle left of a blue star and a green square at the bottom" --out out/first'
    )

    prompt: Prompt
    """What to draw."""
    model: str = "shapes-tiny"
    """Shipped model or a folder in diffusers layout."""
    max_steps: int = 8
    """Drawings at most."""
    nfe: Count = None
    """Network evaluations of each drawing; the model's own number if not given."""
    seed: int = 0
    """The same seed gives the same picture."""
    out: Folder = None
    """Folder for trajectory.json, the pictures and index.html; below out/ if not given."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--max-steps", self.max_steps)
        at_least_one("--nfe", self.nfe)
        check_seed(self.seed)

    def run(self) -> Result:
        """Draws and saves the trajectory."""
        from clvr_jax.outputs import check_folder, name_for

        unseen = _check_request(self.prompt, self.model)
        out = self.out or Path("out") / name_for(self.prompt, self.model, self.seed, self.max_steps, self.nfe)
        check_folder(out)
        with console.status(f"loading {self.model}"):
            _prepare_jax()
            from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

            pipe = ClosedLoopPipeline.from_pretrained(self.model)
        with console.status("thinking and drawing"):
            made = pipe(self.prompt, max_steps=self.max_steps, seed=self.seed, nfe=self.nfe, on_event=_show_event)
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
    """Shipped model or a folder in diffusers layout."""
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
            _prepare_jax()
            from clvr_jax.files import write_atomically
            from clvr_jax.pipelines.flux2 import Flux2Pipeline
            from clvr_jax.reasoning.images import encode_png

            pipe = Flux2Pipeline.from_pretrained(self.model)
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


@dataclass(frozen=True)
class Train:
    """Runs a recipe. `clvr train CONFIG --help` lists what the recipe lets you change."""

    EXAMPLE: ClassVar = "clvr train configs/shapes_vae.py --train.steps 500 --out runs/try"

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """Recipe: a Python file with CONFIG and task(config); it comes before the options."""
    out: Folder = None
    """Folder for checkpoints, metrics and the exported weights; runs/NAME-OF-RECIPE if not given."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    common: Flags = field(default_factory=Common)

    def run(self) -> Result:
        """Trains as the recipe says."""
        recipe = _load_recipe(self.config)
        return self.run_recipe(recipe, recipe.config)

    def run_recipe(self, recipe: "Recipe", config: Any) -> Result:
        """Trains with another config than the recipe's own."""
        from clvr_jax.training.recipes import train

        result = train(recipe, config, self.out or Path("runs") / recipe.name, resume=self.resume)
        return Result(result, result["export"])


@dataclass(frozen=True)
class Eval:
    """Draws the prompts of a benchmark and scores the pictures. A run that was stopped goes on where it was."""

    EXAMPLE: ClassVar = "clvr eval shapes --split complex --limit 60 --model shapes-tiny --out out/complex"

    benchmark: Annotated[Literal["shapes"], tyro.conf.Positional]
    """shapes: its pictures are checked by a program."""
    model: str
    """Shipped model or a folder in diffusers layout."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the pictures in GenEval's layout and results.json."""
    split: Literal["eval", "complex"] = "eval"
    """eval: 553 prompts with GenEval's tags. complex: 300 prompts with 3 to 6 objects."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Prompts of your own in GenEval's metadata format, instead of a split."""
    mode: Literal["one-shot", "closed-loop"] = "one-shot"
    """one-shot: each prompt is drawn once. closed-loop: plan, draw, look, correct."""
    controller: Literal["vlm", "oracle"] = "vlm"
    """Of the closed loop: the model's own, or the oracle that reads pictures exactly."""
    max_steps: Count = None
    """Drawings of the closed loop at most; 8 if not given."""
    limit: Count = None
    """Use at most so many prompts, spread over the set."""
    steps: Count = None
    """Sampler steps in one shot; the model's own number if not given."""
    guidance: Guidance = None
    """Guidance in one shot; the model's own if not given."""
    against: Folder = None
    """Folder of another run on the same prompts, for a paired comparison with this one."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--max-steps", self.max_steps)
        at_least_one("--limit", self.limit)
        at_least_one("--steps", self.steps)
        check_guidance(self.guidance)

    def run(self) -> Result:
        """Draws, scores, and writes results.json."""
        _prepare_jax()
        from clvr_jax.evaluation.compare import compare, comparison_table, load_results
        from clvr_jax.evaluation.report import rich_table
        from clvr_jax.evaluation.systems import evaluate_shapes

        other = load_results(self.against) if self.against else None  # before minutes are spent
        title = f"{self.benchmark} {self.prompts or self.split}, {self.model}, {self.mode}"
        with contextlib.ExitStack() as stack:
            advance: Callable[[int], None] | None = None

            def on_progress(done: int, total: int) -> None:
                nonlocal advance
                if advance is None:
                    advance = stack.enter_context(progress(title, total, done))
                advance(done)

            results = evaluate_shapes(
                self.model,
                self.out,
                split=self.split,
                prompts=self.prompts,
                mode=self.mode,
                controller=self.controller,
                max_steps=self.max_steps,
                limit=self.limit,
                steps=self.steps,
                guidance=self.guidance,
                on_progress=on_progress,
            )
        data = {key: value for key, value in results.items() if key != "pictures"}
        table = rich_table(results["summary"], title)
        if other is None:
            return Result({**data, "out": str(self.out)}, table)
        comparison = compare(other, results)
        both = Group(table, comparison_table(comparison, str(self.against), str(self.out)))
        return Result({**data, "out": str(self.out), "comparison": comparison}, both)


@dataclass(frozen=True)
class Convert:
    """Converts a pipeline or model folder from PyTorch to JAX or back, one tensor at a time."""

    EXAMPLE: ClassVar = "clvr convert path/to/FLUX.2-klein-base-4B checkpoints/klein --to jax"

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder in diffusers or transformers layout with safetensors, or one that was converted to jax."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """New folder; it appears only when it is complete."""
    to: Literal["jax", "torch"]
    """jax: Orbax. torch: safetensors that diffusers and transformers load."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of floating-point tensors; if not given each keeps its own, bit for bit."""
    dry_run: bool = False
    """Print what would be written, and write nothing."""
    resume: bool = False
    """Go on with a conversion that was stopped."""
    common: Flags = field(default_factory=Common)

    def run(self) -> Result:
        """Plans, and converts unless it is a dry run."""
        from clvr_jax.convert.conversion import convert, plan
        from clvr_jax.convert.report import conversion_table, tensor_list

        conversion = plan(self.source, self.to, self.dtype)
        data = {"source": str(self.source), "to": self.to, "tensors": conversion.tensors, "bytes": conversion.nbytes}
        if self.dry_run:
            return Result({**data, "plan": tensor_list(conversion)}, conversion_table(conversion))
        with progress(f"{self.source.name} to {self.to}", conversion.tensors) as advance:
            count = 0

            def on_tensor(name: str) -> None:
                nonlocal count
                count += 1
                advance(count, name)

            not_finite = convert(conversion, self.destination, resume=self.resume, on_tensor=on_tensor)
        for name in not_finite:
            console.print(f"[yellow]warning:[/] {name} holds NaN", highlight=False)
        return Result({**data, "out": str(self.destination), "nan": not_finite}, str(self.destination))


Command = Generate | Sample | Train | Eval | Convert
COMMANDS: dict[str, type[Command]] = {
    "generate": Generate,
    "sample": Sample,
    "train": Train,
    "eval": Eval,
    "convert": Convert,
}
_DESCRIPTION = "Dense prompts become pictures through a loop of planning, drawing and checking."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        command = parse(given)
        result = command.run()
        if command.common.json:
            print(json.dumps(result.data, ensure_ascii=False))
        else:
            Console(soft_wrap=isinstance(result.text, str), highlight=False).print(result.text, markup=False)
        return 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last resort: a person reads one line
        if debug:
            traceback.print_exc()
        if isinstance(error, ClvrError):
            _complain(str(error))
            return 2 if isinstance(error, UsageError) else 1
        _complain(f"{type(error).__name__}: {error}; --debug shows where")
        return 1


def parse(arguments: Sequence[str]) -> Command:
    """The command of a command line.

    Raises: UsageError, one line, if it makes no sense; SystemExit(0) after --help.
    """
    arguments = _common_flags_last(arguments)
    if not arguments or arguments[0] not in COMMANDS:
        known = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
        commands: Any = Union[known]  # noqa: UP007 - made from a table
        return read_arguments(commands, arguments, "clvr", _DESCRIPTION, Generate.EXAMPLE)
    name, rest = arguments[0], arguments[1:]
    if name == "train":
        return _parse_train(rest)
    kind: Any = COMMANDS[name]
    return read_arguments(kind, rest, f"clvr {name}", kind.__doc__, kind.EXAMPLE)


def _common_flags_last(arguments: Sequence[str]) -> list[str]:
    """`clvr --json generate ...` -> `clvr generate --json ...`."""
    flags = ("--json", "--debug")
    leading = next((i for i, argument in enumerate(arguments) if argument not in flags), len(arguments))
    return [*arguments[leading : leading + 1], *arguments[:leading], *arguments[leading + 1 :]]


def _parse_train(arguments: Sequence[str]) -> Train:
    """Reads the recipe first, since it says which options there are."""
    path = next((argument for argument in arguments if not argument.startswith("-")), None)
    if path is None:
        return read_arguments(Train, arguments, "clvr train", Train.__doc__, Train.EXAMPLE)
    recipe = _load_recipe(Path(path))
    options: Any = Annotated[type(recipe.config), tyro.conf.arg(name="")]

    @dataclass(frozen=True)
    class TrainRecipe(Train):
        config_with_overrides: options = field(default_factory=lambda: recipe.config)

        def run(self) -> Result:
            return self.run_recipe(recipe, self.config_with_overrides)

    example = f"clvr train {path} --train.steps 500 --out runs/try"
    return read_arguments(TrainRecipe, arguments, "clvr train", f"{path}: {recipe.description}", example)


def _load_recipe(path: Path) -> "Recipe":
    _prepare_jax()
    from clvr_jax.training.recipes import load_recipe

    return load_recipe(path)


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


def _prepare_jax() -> None:
    """Settings that must come before models are imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises everyone to install PyTorch
    from clvr_jax.compilation import keep_compiled_programs

    keep_compiled_programs()


def _show_event(event: "Event") -> None:
    """Prints what the loop does as it does it."""
    from clvr_jax.reasoning.actions import parse, strip_action, unmet_span
    from clvr_jax.reasoning.events import Drawn, Finished, Replied, RolledBack

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
    elif isinstance(event, RolledBack):
        console.print(f"[yellow]  step {event.number} is worse than step {event.to}: back to step {event.to}[/]")
    elif isinstance(event, Finished):
        color = "green" if event.trajectory.outcome == "accepted" else "yellow"
        spent = (
            f"{len(event.trajectory.drawings)} drawings, {event.trajectory.nfe} NFE, {event.trajectory.seconds:.1f} s"
        )
        console.print(f"[bold {color}]{event.trajectory.outcome}[/]  {spent}")


def _complain(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    print("clvr: " + " ".join(message.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
