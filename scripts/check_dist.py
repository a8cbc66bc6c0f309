"""Checks the wheel and the sdist in a directory, tries both, and writes an SBOM and checksums beside them.

    python scripts/check_dist.py dist

Each is installed without any extra in an empty environment of the Python that runs this program, where `clvr generate`
generates an image. The SBOM (CycloneDX) lists what the wheel's environment has: the package and its dependencies.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"clvr_jax": "clvr_jax", "configs": "clvr_jax/configs", "convert": "clvr_jax/convert"}
"""Directory of the repository -> the directory that it installs as."""
IN_SDIST = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml"}
IN_SDIST |= {"setup.cfg", "setup.py"}
EXPECTED = ("LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
"""Files of the wheel's dist-info directory."""
OF_EXTRAS = ("torch", "tensorflow", "grain", "openai", "fastapi", "matplotlib")
"""Packages that only an extra brings."""
LOOP = ("generate", "a red circle", "--max-steps", "1", "--json")


def sources(root: Path = ROOT) -> dict[str, str]:
    """Returns file of the repository -> its path in the wheel, for all that is shipped."""
    found = {}
    for directory, installed in SOURCES.items():
        for path in (root / directory).rglob("*"):
            relative = path.relative_to(root / directory)
            if path.is_file() and "__pycache__" not in relative.parts:
                found[f"{directory}/{relative.as_posix()}"] = f"{installed}/{relative.as_posix()}"
    return found


def differences(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """Returns one line for each file that is missing or unexpected."""
    expected, found = set(expected), set(found)
    return [
        *(f"missing: {name}" for name in sorted(expected - found)),
        *(f"unexpected: {name}" for name in sorted(found - expected)),
    ]


def wheel_differences(wheel: Path, shipped: dict[str, str]) -> list[str]:
    """Returns how the files of a wheel differ from `shipped`, from `sources`, and the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"
    metadata = [f"{info}/licenses/{name}" if name == "LICENSE" else f"{info}/{name}" for name in EXPECTED]
    return differences([*shipped.values(), *metadata], names)


def sdist_differences(sdist: Path, shipped: dict[str, str]) -> list[str]:
    """Returns how the files of an sdist differ from `shipped`, from `sources`, and the files that build it."""
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    return differences([*shipped, *IN_SDIST], [name for name in names if ".egg-info/" not in name])


def download_dependencies(wheel: Path, directory: Path) -> None:
    """Downloads what a wheel needs, and what builds an sdist, so that the index is asked once for both packages."""
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory), str(wheel), *backend])
    (directory / wheel.name).unlink()


def try_package(package: Path, dependencies: Path, environment: Path) -> str:
    """Installs a package in an empty environment and generates an image there; returns the printed version."""
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    offline = ("--no-index", "--find-links", str(dependencies))
    _run([*pip, "install", "--quiet", "--no-compile", *offline, str(package)])
    _run([*pip, "check", "--quiet"])
    clvr, work = str(environment / "bin" / "clvr"), environment / "work"
    work.mkdir()
    version = _run([clvr, "--version"], work).strip()
    result = json.loads(_run([clvr, *LOOP, "--out", str(work / "loop")], work))
    if not Path(result["page"]).is_file() or not Path(result["image"]).is_file():
        raise SystemExit(f"{package.name}: clvr generate wrote no image: {result}")
    return version


def write_sbom(python: Path, path: Path, version: str) -> None:
    """Writes the SBOM of an environment, and checks what it must and must not list."""
    options = ["--of", "JSON", "--output-reproducible", "--pyproject", str(ROOT / "pyproject.toml"), "-o", str(path)]
    _run([str(Path(sys.executable).parent / "cyclonedx-py"), "environment", *options, str(python)])
    content = json.loads(path.read_text(encoding="utf-8"))
    subject = content["metadata"]["component"]
    names = {component["name"].lower() for component in content["components"]} - {"clvr-jax"}
    if (subject["name"], subject["version"]) != ("clvr-jax", version) or not {"jax", "flax"} <= names:
        raise SystemExit(f"{path}: not the SBOM of clvr-jax {version}")
    if extras := names & set(OF_EXTRAS):
        raise SystemExit(f"{path}: without any extra, {', '.join(sorted(extras))} should not be installed")


def write_checksums(directory: Path) -> None:
    """Writes SHA256SUMS, which `sha256sum --check` reads."""
    files = sorted(path for path in directory.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def main(directory: Path) -> None:
    """Checks, tries and describes the two packages in a directory. Raises: SystemExit, one line, if one is wrong."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version, shipped = project["version"], sources()
    wheel = directory / f"clvr_jax-{version}-py3-none-any.whl"
    sdist = directory / f"clvr_jax-{version}.tar.gz"
    if wrong := differences([wheel.name, sdist.name], [path.name for path in directory.iterdir()]):
        raise SystemExit(f"{directory}: {'; '.join(wrong)}")
    for package, found in ((wheel, wheel_differences(wheel, shipped)), (sdist, sdist_differences(sdist, shipped))):
        if found:
            raise SystemExit(f"{package}: {'; '.join(found)}")
    with tempfile.TemporaryDirectory() as temporary:
        dependencies = Path(temporary) / "dependencies"
        download_dependencies(wheel, dependencies)
        for package in (wheel, sdist):
            environment = Path(temporary) / package.suffix.strip(".")
            if (printed := try_package(package, dependencies, environment)) != f"clvr-jax {version}":
                raise SystemExit(f"{package}: clvr --version prints {printed!r}")
            if package is wheel:
                sbom = directory / f"clvr_jax-{version}.cdx.json"
                write_sbom(environment / "bin" / "python", sbom, version)
            print(f"{package.name}: installs and generates on Python {sys.version.split()[0]}")
    write_checksums(directory)


def _run(command: Sequence[str], directory: Path | None = None) -> str:
    """Runs a command without what this environment sets; returns its output. Raises: SystemExit if it fails."""
    settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=directory, env=settings, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python scripts/check_dist.py DIRECTORY")
    main(Path(sys.argv[1]))
