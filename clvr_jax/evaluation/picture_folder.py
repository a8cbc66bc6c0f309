"""A folder of pictures that were made elsewhere, as a system: what is asked for by its prompt is looked up.

Either <folder>/metadata.jsonl has lines {"file_name": ..., "prompt": ...} (Hugging Face's ImageFolder; "text" and
"caption" are understood too), or every subfolder has GenEval's metadata.jsonl and samples/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.drawn import Drawn, picture_seed
from clvr_jax.evaluation.systems import System
from clvr_jax.file_names import listed_file
from clvr_jax.json_input import parse_object, read_lines, read_object
from clvr_jax.reasoning.images import read_image

_PROMPT_KEYS = ("prompt", "text", "caption")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LISTED = 5


def picture_folder(folder: Path, name: str, seed: int = 0) -> System:
    """The pictures of a folder.

    Args:
      folder: see above. Several pictures of a prompt are its samples, in order.
      name: who made them.
      seed: of the run; which sample is asked for follows from it.
    Raises: ClvrError if the folder has no pictures in one of the two forms; later, if a prompt has none.
    """
    files = _listed(folder) if (folder / "metadata.jsonl").is_file() else _geneval(folder)
    if not files:
        raise ClvrError(
            f"{folder}: no pictures; expected is a metadata.jsonl with file_name and prompt in each line, or folders "
            "00000, 00001, ... with metadata.jsonl and samples/"
        )

    def draw_all(prompts: list[str], seeds: list[int]) -> list[Drawn]:
        found = [_file(files, prompt, own, seed) for prompt, own in zip(prompts, seeds, strict=True)]
        missing = [prompt for prompt, path in zip(prompts, found, strict=True) if path is None]
        if missing:
            named = "; ".join(repr(prompt) for prompt in missing[:_LISTED])
            raise ClvrError(f"{folder}: lacks pictures of {len(missing)} prompts, e.g. {named}")
        return [Drawn(read_image(path)) for path in found if path is not None]

    sizes = {str(path.relative_to(folder)): path.stat().st_size for paths in files.values() for path in paths}
    digest = hashlib.blake2b(json.dumps(sizes, sort_keys=True).encode(), digest_size=8).hexdigest()
    return System(draw_all, {"mode": "pictures", "model": name, "files": digest})


def _file(files: dict[str, list[Path]], prompt: str, own_seed: int, seed: int) -> Path | None:
    """The sample that a run of this seed asks for with a picture's own seed."""
    for sample, path in enumerate(files.get(prompt, ())):
        if picture_seed(seed, prompt, sample) == own_seed:
            return path
    return None


def _listed(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for where, line in read_lines(folder / "metadata.jsonl"):
        entry = parse_object(line, where)
        prompt = next((entry.text(key) for key in _PROMPT_KEYS if isinstance(entry.content.get(key), str)), None)
        if prompt is None or not isinstance(entry.content.get("file_name"), str):
            raise ClvrError(f"{where}: lacks file_name or prompt")
        files.setdefault(prompt, []).append(listed_file(folder, entry.text("file_name"), where))
    return files


def _geneval(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        prompt = read_object(path).text("prompt")
        files.setdefault(prompt, []).extend(_pictures(path.parent / "samples"))
    return {prompt: pictures for prompt, pictures in files.items() if pictures}


def _pictures(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.suffix.lower() in _SUFFIXES)
