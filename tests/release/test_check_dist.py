"""scripts/check_dist.py finds a file that is missing from a package, and one that should not be there."""

import hashlib
import sys
import tarfile
import zipfile

import pytest

from tests.docs.pages import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from check_dist import EXPECTED, IN_SDIST, sdist_differences, sources, wheel_differences, write_checksums

INFO = "clvr_jax-0.1.0.dist-info"


@pytest.fixture(scope="module")
def shipped():
    return sources()


def wheel(directory, names):
    path = directory / "clvr_jax-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def sdist(directory, names):
    path = directory / "clvr_jax-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"clvr_jax-0.1.0/{name}"))
    return path


def test_what_is_shipped_has_weights_recipes_conversion_the_page_and_types(shipped):
    for name in (
        "clvr_jax/shipped/shapes-tiny/transformer/diffusion_pytorch_model.safetensors",
        "clvr_jax/configs/flux2_sft.py",
        "clvr_jax/convert/architectures/registry.py",
        "clvr_jax/serving/page/index.html",
        "clvr_jax/evaluation/benchmarks/rubrics/wise_verified.md",
        "clvr_jax/py.typed",
    ):
        assert name in shipped.values()
    assert not [name for name in shipped.values() if name.startswith(("tests/", "docs/", "runs/"))]


def test_a_wheel_has_exactly_what_is_shipped(shipped, tmp_path):
    metadata = [f"{INFO}/licenses/LICENSE", *(f"{INFO}/{name}" for name in EXPECTED if name != "LICENSE")]
    whole = [*shipped.values(), *metadata]
    assert wheel_differences(wheel(tmp_path, whole), shipped) == []
    changed = [name for name in whole if name != "clvr_jax/py.typed"] + ["tests/test_cli.py"]
    found = wheel_differences(wheel(tmp_path, changed), shipped)
    assert found == ["missing: clvr_jax/py.typed", "unexpected: tests/test_cli.py"]


def test_an_sdist_has_exactly_what_is_shipped_and_builds_it(shipped, tmp_path):
    whole = [*shipped, *IN_SDIST]
    assert sdist_differences(sdist(tmp_path, [*whole, "clvr_jax.egg-info/PKG-INFO"]), shipped) == []
    changed = [name for name in whole if name != "configs/flux2_sft.py"] + ["docs/index.md"]
    found = sdist_differences(sdist(tmp_path, changed), shipped)
    assert found == ["missing: configs/flux2_sft.py", "unexpected: docs/index.md"]


def test_checksums_are_those_of_the_files(tmp_path):
    (tmp_path / "b").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    write_checksums(tmp_path)
    write_checksums(tmp_path)  # its own file is not among them
    digests = [hashlib.sha256(content).hexdigest() for content in (b"1", b"2")]
    assert (tmp_path / "SHA256SUMS").read_text() == f"{digests[0]}  a\n{digests[1]}  b\n"
