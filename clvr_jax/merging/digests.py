"""sha256 of files that are computed while the files are read for a merge, so that most bytes are read once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from clvr_jax.checkpoint_io.tensors import StoredTensor
from clvr_jax.errors import ClvrError

_STEP = 4 * 2**20
_GAP = 64 * 2**20  # a header, or tensors that are left out


class FileDigest:
    """The sha256 of one file."""

    def __init__(self, path: Path):
        self._path, self._hash, self._position = path, hashlib.sha256(), 0

    def follow(self, begin: int, end: int) -> None:
        """Reads up to `end` if the bytes from `begin` to `end` follow the current position.

        The bytes are then in the page cache, so this also reads ahead.
        """
        if begin - _GAP <= self._position < end:
            self._read(end)

    def finish(self) -> str:
        """Reads the rest of the file. Returns: the digest of the complete file."""
        self._read(self._path.stat().st_size)
        return self._hash.hexdigest()

    def _read(self, end: int) -> None:
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._position)
                while self._position < end:
                    part = file.read(min(_STEP, end - self._position))
                    if not part:
                        raise ClvrError(f"{self._path}: became shorter while it was read; fetch it again")
                    self._hash.update(part)
                    self._position += len(part)
        except OSError as error:
            raise ClvrError(f"{self._path}: cannot be read ({error.strerror or error})") from error


class Digests:
    """The sha256 of the files of one model.

    Args:
      files: name -> file or directory; the digest of a directory is that of the lines "sha256 name" of its files.
    """

    def __init__(self, files: Mapping[str, Path]):
        self._files = files
        self._digests = {path: FileDigest(path) for path in files.values() if path.is_file()}
        self._finished: dict[str, str] | None = None

    def follow(self, tensor: StoredTensor) -> None:
        """Reads the bytes of a tensor into the digest of its file if they follow the current position."""
        if self._finished is None:
            self._digests[tensor.file].follow(tensor.offset, tensor.offset + tensor.nbytes)

    def finish(self) -> dict[str, str]:
        """Reads the remaining bytes. Returns: name -> digest."""
        if self._finished is None:
            self._finished = {
                name: self._digests[path].finish() if path in self._digests else _of_folder(path)
                for name, path in self._files.items()
            }
        return self._finished


def _of_folder(directory: Path) -> str:
    # _CHECKPOINT_METADATA contains the time of saving; equal weights should have equal digests.
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "_CHECKPOINT_METADATA")
    lines = [f"{FileDigest(path).finish()} {path.relative_to(directory).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
