"""Stages whose results are kept under the hash of what went into them, so that a stopped run goes on where it was."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clvr_jax.console import console
from clvr_jax.files import read_json, write_json

_RECORDS = "stages"


class Stages:
    """A folder of results.

    root: each stage has a folder in it, named after the stage and the hash of its inputs; `stages/` says which are
    complete, what went into them, and how long they took.
    """

    def __init__(self, root: Path):
        self.root = root
        self.seconds: dict[str, float] = {}
        """Of every stage that was asked for, whenever it was made."""

    def folder(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """The folder of a stage, made if it is not complete.

        Args:
          name: of the stage.
          inputs: JSON values that the result follows from; models by their `digest`.
          make: fills the folder. It meets what it left there if it was stopped before.
        """
        plain = json.loads(json.dumps(inputs))
        key = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=5).hexdigest()
        folder = self.root / f"{name}-{key}"
        record = self.root / _RECORDS / f"{folder.name}.json"
        if not (record.exists() and folder.exists()):
            console.print(f"stage {folder.name}")
            began = time.monotonic()
            make(folder)
            # A stage that was stopped took longer than this: what it drew before is in its own records.
            write_json(record, {"name": name, "inputs": plain, "seconds": round(time.monotonic() - began, 1)})
        self.seconds[name] = read_json(record)["seconds"]
        return folder


def digest(folder: Path) -> str:
    """A hash of all files in a folder and of their names; README.md, which names no number of the model, left out."""
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"):
        found.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()
