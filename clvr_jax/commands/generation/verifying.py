"""`clvr verify`: checks images against a prompt, requirement by requirement."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Common, Count, Flags, Prompt, Result, prepare_jax
from clvr_jax.display.console import console
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import JSON

if TYPE_CHECKING:
    import numpy as np

    from clvr_jax.reasoning.verification.model_verifier import ModelVerifier
    from clvr_jax.reasoning.verification.text_in_images import TextVerifier
    from clvr_jax.reasoning.verification.verification import Requirement, Verification

_DEFAULT_MODEL = "shapes-tiny"
_NOTHING_TO_CHECK = "The prompt asks for nothing that can be checked in an image."


@dataclass(frozen=True)
class EndpointOptions:
    """A vision-language model behind an OpenAI-compatible chat API."""

    url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Verify with a model behind this OpenAI-compatible chat API in place of --model. Give the URL up to and including
    the version, such as http://localhost:8000/v1."""
    endpoint_model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The server's name for the model behind --url."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key of --url; "" for a server without keys."""
    in_flight: int = 16
    """Send at most this many requests to --url at a time."""
    max_seconds: float = 1200.0
    """Wait this many seconds at most for a whole reply of --url, however slowly it comes."""
    max_tokens: Count = None
    """Allow this many tokens in a reply of --url; 512 if not given. Models that think first need more."""
    prices: Annotated[tuple[float, ...], tyro.conf.arg(metavar="READ WRITTEN")] = ()
    """Dollars that the server charges for a million input tokens and for a million output tokens; the cost is not
    counted if not given."""

    def __post_init__(self) -> None:
        at_least_one("--in-flight", self.in_flight)
        at_least_one("--max-tokens", self.max_tokens)
        if bool(self.url) != bool(self.endpoint_model):
            raise UsageError("--url URL and --endpoint-model NAME must be given together")
        if not self.url and (self.max_tokens or self.prices):
            raise UsageError("--max-tokens and --prices are for --url")
        if len(self.prices) not in (0, 2):
            raise UsageError("--prices must be two prices, of input and output tokens")

    def verifier(self, mode: Literal["describe", "ask"]) -> "ModelVerifier":
        """Connects to the server. Raises: ClvrError if the key or the openai package is missing."""
        from clvr_jax.providers.endpoint import Endpoint, Prices
        from clvr_jax.providers.openai_chat import OpenAIChatModel
        from clvr_jax.reasoning.verification.model_verifier import ModelVerifier

        endpoint = Endpoint(
            self.endpoint_model or "",
            self.url or "",
            self.key_variable or None,
            max_in_flight=self.in_flight,
            prices=Prices(*self.prices),
            max_seconds=self.max_seconds,
        )
        return ModelVerifier(OpenAIChatModel(endpoint), mode, max_tokens=self.max_tokens or 512)


@dataclass(frozen=True)
class Verify:
    """Checks images against a prompt, requirement by requirement: met or unmet, how probable, and on what evidence."""

    EXAMPLE: ClassVar = 'clvr verify "a red circle left of a blue star" first.png second.png --model shapes-tiny'

    prompt: Prompt
    """Verify the images against this prompt."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")]
    """Verify these image files: PNG, JPEG or WebP."""
    model: str = _DEFAULT_MODEL
    """Verify with this model: a shipped name, a directory with controller/, or a directory or Hugging Face id of a
    Qwen3-VL."""
    mode: Literal["describe", "ask"] | None = None
    """How the model verifies. describe: it describes the image before it sees a requirement, then compares. ask: it
    answers whether the image meets each requirement. If not given, describe for models that were trained for the loop,
    and ask for others."""
    requirement: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()
    """Check these requirements, each in quotes; the model derives them from the prompt if none is given."""
    read_text: bool = False
    """Read the text in images by OCR: every quoted text of the prompt is a requirement `the image says "..."`, which is
    met if it is read (pip install 'clvr-jax[ocr]')."""
    endpoint: Annotated[EndpointOptions, tyro.conf.arg(name="")] = field(default_factory=EndpointOptions)
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        if not self.images:
            raise UsageError("give at least one IMAGE after the prompt")
        if any(not _requirement_text(text) for text in self.requirement):
            raise UsageError("--requirement is empty; write what the image must show")
        for name, text in (("the prompt", self.prompt), *(("--requirement", text) for text in self.requirement)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UsageError(f"{name} is not valid UTF-8 text") from error
        if self.endpoint.url and self.model != _DEFAULT_MODEL:
            raise UsageError("--model and --url name two verifiers; give one of them")

    def run(self) -> Result:
        """Reads and verifies the images, and returns the report."""
        from clvr_jax.data.preprocessing.text import check_prompt
        from clvr_jax.files.image_io import read_image

        check_prompt(self.prompt)
        images = [read_image(path) for path in self.images]
        verifier = self._reading(lambda: self._verifier(images))
        given = tuple(_requirement_text(text) for text in self.requirement)
        began = time.monotonic()
        with console.status(f"verifying {len(images)} image{'s' if len(images) > 1 else ''}"):
            found = verifier.verify([self.prompt] * len(images), images, [given] * len(images) if given else None)
        usage = {**asdict(verifier.usage), "seconds": round(time.monotonic() - began, 3)}
        data = {
            "prompt": self.prompt,
            "verifier": verifier.name,
            "requirements": "given" if given else "derived",
            "images": [
                _image_data(path, image, verification)
                for path, image, verification in zip(self.images, images, found, strict=True)
            ],
            "adapted": list(verifier.adapted),
            "usage": usage,
        }
        return Result(data, _text(self.images, found, verifier.name, verifier.adapted))

    def _reading(self, load: "Callable[[], ModelVerifier]") -> "ModelVerifier | TextVerifier":
        """Returns the verifier, with a reader of text if there is to be one, which is made first: it may be missing."""
        if not self.read_text:
            return load()
        from clvr_jax.providers.ocr import RapidTextReader
        from clvr_jax.reasoning.verification.text_in_images import TextVerifier

        reader = RapidTextReader()
        return TextVerifier(load(), reader)

    def _verifier(self, images: "Sequence[np.ndarray]") -> "ModelVerifier":
        """Loads the verifier, after all checks that do not need it."""
        if self.endpoint.url:
            return self.endpoint.verifier(self.mode or "ask")
        from clvr_jax.pipelines.qwen3_vl import Verifier
        from clvr_jax.pipelines.qwen3_vl.verifier import controller_directory

        directory, _ = controller_directory(self.model)
        _check_sizes(self.model, directory, self.images, images)
        if not self.requirement:
            _warn_of_unseen_words(self.model, directory, self.prompt)
        with console.status(f"loading {self.model}"):
            prepare_jax()
            return Verifier.from_pretrained(self.model, mode=self.mode)


def _requirement_text(text: str) -> str:
    """Returns a requirement on one line and without a final period, as the verifier takes it."""
    return " ".join(text.split()).rstrip(". ")


def _check_sizes(model: str, directory: Path, paths: Sequence[Path], images: "Sequence[np.ndarray]") -> None:
    """Raises ClvrError for an image that the model cannot read; warns if one is resized to the only trained size."""
    from math import isqrt

    from clvr_jax.data.preprocessing.qwen3_vl_images import load_processor

    processor = load_processor(directory)
    has_one_size = processor.min_pixels == processor.max_pixels
    side = isqrt(processor.max_pixels)
    resized: dict[tuple[int, int], list[Path]] = {}
    for path, image in zip(paths, images, strict=True):
        height, width = image.shape[:2]
        try:
            target = processor.resized(height, width)
        except ClvrError as error:
            raise ClvrError(f"{path}: {error}") from error
        if has_one_size and target != (height, width):
            resized.setdefault((height, width), []).append(path)
    for (height, width), same in resized.items():
        rows, columns = processor.resized(height, width)
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        note = f"{same[0]}{more}: {width} x {height} pixels, resized to {columns} x {rows} for {model}"
        if rows != columns:
            note += f", which was trained on images of {side} x {side} only; do not rely on the result"
        _warn(note)


def _warn_of_unseen_words(model: str, directory: Path, prompt: str) -> None:
    from clvr_jax.pipelines.world import unseen_words

    if (directory.parent / "model_index.json").exists():
        unseen = unseen_words(str(directory.parent), prompt)
        if unseen:
            _warn(f"{model} never saw: {', '.join(unseen[:8])}{' ...' if len(unseen) > 8 else ''}")


def _warn(message: str) -> None:
    console.print(f"[yellow]warning:[/] {escape(_printable(message))}")


def _image_data(path: Path, image: "np.ndarray", verification: "Verification") -> dict[str, JSON]:
    return {
        "image": str(path),
        "height": image.shape[0],
        "width": image.shape[1],
        "accepted": verification.accepted,
        "note": None if verification.requirements else _NOTHING_TO_CHECK,
        "probability": verification.probability,
        "unmet": list(verification.unmet),
        "description": verification.description,
        "mode": verification.mode,
        "requirements": [asdict(each) for each in verification.requirements],
    }


def _text(paths: Sequence[Path], found: "Sequence[Verification]", name: str, adapted: Sequence[str]) -> RenderableType:
    """Returns the result for a terminal, with a block for each image."""
    from clvr_jax.reasoning.verification.verification import DOUBT_NOTE

    parts: list[RenderableType] = []
    for path, verification in zip(paths, found, strict=True):
        parts.append(_heading(path, verification))
        if verification.requirements:
            table = Table.grid(padding=(0, 2, 0, 0))
            for each in verification.requirements:
                table.add_row("", *_cells(each))
            parts.append(table)
        if verification.description:
            parts.append(Text(f"  description: {_printable(verification.description)}", overflow="fold"))
        parts.append(Text(""))
    checked = [each for verification in found for each in verification.requirements if each.met is not None]
    if checked and all(each.probability is None for each in checked):
        parts.append(Text("No probabilities: the model gives no probabilities of its tokens.", "dim"))
    if any(each.is_doubtful for each in checked):
        parts.append(Text(DOUBT_NOTE, "dim"))
    if adapted:
        parts.append(Text(f"Changes to requests that the server required: {_printable('; '.join(adapted))}.", "dim"))
    parts.append(Text(f"verified by {_printable(name)}", "dim", overflow="fold"))
    return Group(*parts)


def _heading(path: Path, verification: "Verification") -> Text:
    said, style = {True: ("yes", "bold green"), False: ("no", "bold yellow"), None: ("nothing to check", "bold")}[
        verification.accepted
    ]
    heading = Text.assemble(f"{_printable(str(path))}  accepted: ", (said, style), overflow="fold")
    if verification.accepted is None:
        heading.append(f". {_NOTHING_TO_CHECK}")
    elif not verification.accepted:
        heading.append(f", {len(verification.unmet)} of {len(verification.requirements)} requirements unmet")
    return heading


def _cells(requirement: "Requirement") -> list[Text]:
    style = "green" if requirement.met else "yellow"
    probability = "no probability" if requirement.probability is None else f"{requirement.probability:.3f}"
    texts = Text(_printable(requirement.text)), Text(_printable(requirement.evidence), "dim")
    return [Text(requirement.state, style), Text(probability), *texts]


def _printable(text: str) -> str:
    """Returns a text on one line, without characters that would control a terminal."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in " ".join(text.split()))
