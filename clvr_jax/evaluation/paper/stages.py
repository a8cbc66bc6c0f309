"""Stages whose results are stored under the hash of their inputs, so that an interrupted run resumes."""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from clvr_jax.display.console import console
from clvr_jax.files.atomic_io import write_json
from clvr_jax.files.json_input import read_object

_RECORDS = "stages"


class Stages:
    """A directory of results of stages.

    Args:
      root: has a directory for each stage, named after the stage and the hash of its inputs, and `stages/` with a
        record of the inputs and seconds of each complete stage.
    """

    def __init__(self, root: Path):
        self.root = root
        self.seconds: dict[str, float] = {}
        """Seconds of each requested stage, as recorded when the stage ran."""

    def directory(self, name: str, inputs: Mapping[str, object], run_stage: Callable[[Path], object]) -> Path:
        """Returns the directory of a stage, and runs the stage if it is not complete.

        Args:
          name: of the stage.
          inputs: JSON values that determine the result; models by their `digest`.
          run_stage: writes the directory, which has the files of an earlier call if that was interrupted.
        """
        plain = json.loads(json.dumps(inputs))
        key = hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=5).hexdigest()
        directory = self.root / f"{name}-{key}"
        record = self.root / _RECORDS / f"{directory.name}.json"
        if not (record.exists() and directory.exists()):
            console.print(f"stage {directory.name}")
            began = time.monotonic()
            run_stage(directory)
            # An interrupted stage took longer than this; records of its images have the time before the interruption.
            write_json(record, {"name": name, "inputs": plain, "seconds": round(time.monotonic() - began, 1)})
        self.seconds[name] = read_object(record).number("seconds")
        return directory


def digest(directory: Path, without: Collection[str] = ()) -> str:
    """Returns a hash of all files in a directory and of their names.

    Args:
      directory: of a model.
      without: names of subdirectories that are left out, as README.md is, which has no weights.
    """
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "README.md"):
        if file.relative_to(directory).parts[0] in without:
            continue
        found.update(f"{file.relative_to(directory).as_posix()} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()
