"""Its place and that of packages above it in the dependency order, and the algorithm as its docstring shows it."""

import re
from pathlib import Path

import pytest

import clvr_jax
from clvr_jax import rl

PACKAGE = Path(clvr_jax.__file__).parent


@pytest.mark.parametrize(
    ("package", "above"),
    [("rl", {"tasks", "configs"}), ("tasks", {"configs", "scripts"}), ("configs", set()), ("scripts", set())],
)
def test_no_package_below_imports_it(package, above):
    below = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in {package, *above}]
    assert len(below) > 100
    pattern = re.compile(
        rf"^\s*(from|import) clvr_jax\.{package}\b|^from clvr_jax import .*\b{package}\b", re.MULTILINE
    )
    assert not [str(path) for path in below if pattern.search(path.read_text(encoding="utf-8"))]


def test_the_docstring_calls_functions_of_the_package():
    called = re.findall(r"= (\w+)\(", rl.__doc__)
    assert len(called) == 5
    assert set(called) <= set(rl.__all__)
    assert all(hasattr(rl, name) for name in rl.__all__)
