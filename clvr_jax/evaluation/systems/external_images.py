"""External images as a system: each prompt is looked up in a directory that another program wrote.

Either <directory>/metadata.jsonl has lines {"file_name": ..., "prompt": ...} (Hugging Face's ImageFolder; the keys
"text" and "caption" are accepted too), or every subdirectory has GenEval's metadata.jsonl and samples/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.systems.system import System, SystemOutput, image_seed
from clvr_jax.files.file_names import is_regular_file, listed_file
from clvr_jax.files.image_io import read_image
from clvr_jax.files.json_input import parse_object, read_lines, read_object

_PROMPT_KEYS = ("prompt", "text", "caption")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LISTED = 5


def external_images(directory: Path, name: str, seed: int = 0) -> System:
    """Returns a system that looks up the images of a directory.

    Args:
      directory: in one of the two forms above. Several images of a prompt are its samples, in order.
      name: the name of the model that generated the images.
      seed: of the run; it determines which sample a seed of an image selects.
    Raises: ClvrError if the directory has no images in one of the two forms; later, if a prompt has no image.
    """
    files = _listed(directory) if (directory / "metadata.jsonl").is_file() else _geneval(directory)
    if not files:
        raise ClvrError(
            f"{directory}: no images; give a directory with a metadata.jsonl that has file_name and prompt in each "
            "line, or with subdirectories 00000, 00001, ... that have metadata.jsonl and samples/"
        )

    def generate(prompts: list[str], seeds: list[int]) -> list[SystemOutput]:
        found = [_file(files, prompt, own, seed) for prompt, own in zip(prompts, seeds, strict=True)]
        missing = [prompt for prompt, path in zip(prompts, found, strict=True) if path is None]
        if missing:
            named = "; ".join(repr(prompt) for prompt in missing[:_LISTED])
            raise ClvrError(f"{directory}: lacks images of {len(missing)} prompts, for example {named}")
        return [SystemOutput(read_image(path)) for path in found if path is not None]

    sizes = {str(path.relative_to(directory)): path.stat().st_size for paths in files.values() for path in paths}
    digest = hashlib.blake2b(json.dumps(sizes, sort_keys=True).encode(), digest_size=8).hexdigest()
    return System(generate, {"mode": "pictures", "model": name, "files": digest})


def _file(files: dict[str, list[Path]], prompt: str, own_seed: int, seed: int) -> Path | None:
    """Returns the sample that the image's own seed selects in a run with this seed; None if there is none."""
    for sample, path in enumerate(files.get(prompt, ())):
        if image_seed(seed, prompt, sample) == own_seed:
            return path
    return None


def _listed(directory: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for where, line in read_lines(directory / "metadata.jsonl"):
        entry = parse_object(line, where)
        prompt = next((entry.text(key) for key in _PROMPT_KEYS if isinstance(entry.content.get(key), str)), None)
        if prompt is None or not isinstance(entry.content.get("file_name"), str):
            raise ClvrError(f"{where}: lacks file_name or prompt")
        files.setdefault(prompt, []).append(listed_file(directory, entry.text("file_name"), where))
    return files


def _geneval(directory: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("[0-9]*/metadata.jsonl")):
        prompt = read_object(path).text("prompt")
        files.setdefault(prompt, []).extend(_pictures(path.parent / "samples"))
    return {prompt: images for prompt, images in files.items() if images}


def _pictures(directory: Path) -> Sequence[Path]:
    found = sorted(path for path in directory.glob("[0-9]*") if path.suffix.lower() in _SUFFIXES)
    if broken := [path for path in found if not is_regular_file(path)]:
        raise ClvrError(f"{broken[0]}: not a file")
    return found
