"""The prompts of a command, from the command line or a file, and the images to generate for each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from clvr_jax.arguments import at_least_one, check_seed
from clvr_jax.display.console import console
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.json_input import read_text

if TYPE_CHECKING:
    import numpy as np

_MAX_IMAGES = 10_000
"""Maximum number of images for one prompt."""
_MAX_BYTES = 64 << 20
"""Maximum size of a file of prompts in bytes."""

OnePrompt = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
PromptFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class ImageTask:
    """One image to generate: its prompt, its seed, and the name of its file or directory, without suffix."""

    prompt: str
    seed: int
    name: str


def check_prompt_options(prompt: tuple[str, ...], prompts: Path | None, num_images: int, seed: int) -> None:
    """Raises UsageError unless one prompt or one file of prompts is given, with valid numbers."""
    if not prompt and prompts is None:
        raise UsageError("give a PROMPT in quotes, or --prompts FILE with one prompt a line")
    if prompt and prompts is not None:
        raise UsageError("PROMPT and --prompts FILE exclude each other; give one of them")
    if len(prompt) > 1:
        raise UsageError(
            f"PROMPT must be one text in quotes, got {len(prompt)}; several prompts go into --prompts FILE"
        )
    at_least_one("--num-images", num_images)
    check_seed(seed)
    check_seed(seed + num_images - 1)
    if num_images > _MAX_IMAGES:
        raise UsageError(f"--num-images must be at most {_MAX_IMAGES}, got {num_images}")


def read_prompts(prompt: tuple[str, ...], prompts: Path | None, model: str) -> list[str]:
    """Returns the prompts after checks that need no model; warns of words that a small model never saw.

    Raises: ClvrError, one line that names the file and the line, for a prompt that is empty or too long, or a file that
      cannot be read or has none.
    """
    if prompts is None:
        check_request(prompt[0], model)
        return list(prompt)
    lines = read_text(prompts, _MAX_BYTES, "give a text file with one prompt a line").splitlines()
    found = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ClvrError(f"--prompts {prompts}: contains no prompts; write one a line")
    for number, text in found:
        try:
            check_request(text, model)
        except ClvrError as error:
            raise type(error)(f"{prompts}:{number}: {error}") from error
    return [text for _, text in found]


def image_tasks(prompts: Sequence[str], num_images: int, seed: int) -> list[ImageTask]:
    """Returns all images to generate: those of a prompt have the seeds `seed`, `seed` + 1 and so on."""
    from clvr_jax.files.output_paths import output_name

    pairs = [(prompt, seed + number) for prompt in prompts for number in range(num_images)]
    digits = max(3, len(str(len(pairs) - 1)))
    return [
        ImageTask(prompt, own, f"{index:0{digits}d}-{output_name(prompt, own)}")
        for index, (prompt, own) in enumerate(pairs)
    ]


def digest_of(command: object, tasks: Sequence[ImageTask], images: "Sequence[np.ndarray]") -> str:
    """Returns a digest of a command's arguments, prompts and given images, to compare several processes."""
    found = hashlib.blake2b(repr((command, tasks)).encode(errors="backslashreplace"))
    for image in images:
        found.update(repr(image.shape).encode() + image.tobytes())
    return found.hexdigest()


def check_request(prompt: str, model: str) -> list[str]:
    """Checks a prompt without a model; warns of words that the model never saw, and returns them."""
    from clvr_jax.data.preprocessing.text import check_prompt
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
