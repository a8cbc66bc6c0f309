"""Files of a saved trajectory: the directory, written whole or not at all, and the fields that say how it was made."""

import glob
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JsonObject


class RunFields(TypedDict):
    """The fields of a Trajectory that say how it was made."""

    model: str
    seed: int
    versions: dict[str, str]
    seconds: float
    error: str | None


class StepRunFields(TypedDict):
    """The fields of a Step that say how it was made."""

    nfe: int
    seconds: float
    rolled_back: bool
    attempts: int
    redraw: int
    seed: int | None


def run_from_json(entry: JsonObject) -> RunFields:
    """The fields of a Trajectory that say how it was made, checked. Raises: ClvrError for another type or range."""
    versions = entry.nested("versions")
    return {
        "model": entry.text("model"),
        "seed": entry.integer("seed"),
        "versions": {name: versions.text(name) for name in versions.content},
        "seconds": entry.number("seconds", low=0),
        "error": entry.optional("error", entry.text) if "error" in entry.content else None,
    }


def step_run_from_json(entry: JsonObject) -> StepRunFields:
    """The fields of a Step that say how it was made, checked. Raises: ClvrError for another type or range."""
    return {
        "nfe": entry.integer("nfe", low=0),
        "seconds": entry.number("seconds", low=0),
        "rolled_back": entry.boolean("rolled_back"),
        "attempts": entry.integer("attempts", low=0),
        "redraw": entry.integer("redraw", low=0),
        "seed": entry.optional("seed", entry.integer),
    }


def write_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into a directory; the last of them, trajectory.json, marks it as whole.

    Raises: ClvrError, one line, if the directory cannot be written; nothing is left behind then.
    """
    remains: list[Path] = []
    try:
        exists = directory.is_dir()
        # Inside an existing directory: the same file system for sure, and its parent need not be writable.
        place, name = directory if exists else directory.parent, f".{directory.name or 'trajectory'}"
        temporary = place / f"{name}.{uuid.uuid4().hex[:12]}.saving"
        remains = [temporary, *place.glob(f"{glob.escape(name)}.*.saving")]  # the others are of saves that were killed
        temporary.mkdir(parents=True)
        for file, content in files.items():
            (temporary / file).write_bytes(content)
        if not exists:
            temporary.rename(directory)
            return
        (directory / "trajectory.json").unlink(missing_ok=True)
        for stale in (*directory.glob("step_*.png"), *directory.glob("given_*.png")):
            if re.fullmatch(r"(step|given)_\d+\.png", stale.name) and stale.name not in files:
                stale.unlink()
        for file in files:
            (temporary / file).replace(directory / file)
    except OSError as error:
        raise ClvrError(f"{directory}: cannot save the trajectory ({error.strerror or error})") from error
    finally:
        for path in remains:
            shutil.rmtree(path, ignore_errors=True)
