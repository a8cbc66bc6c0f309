"""The package: its place in the dependency order, and the algorithm as its docstring shows it."""

import re
from pathlib import Path

import clvr_jax
from clvr_jax import rl

PACKAGE = Path(clvr_jax.__file__).parent


def test_no_package_below_imports_it():
    below = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ("rl", "tasks", "configs")
    ]
    assert len(below) > 100
    pattern = re.compile(r"^\s*(from|import) clvr_jax\.rl\b|^from clvr_jax import .*\brl\b", re.MULTILINE)
    assert not [str(path) for path in below if pattern.search(path.read_text(encoding="utf-8"))]


def test_the_docstring_calls_functions_of_the_package():
    called = re.findall(r"= (\w+)\(", rl.__doc__)
    assert len(called) == 5
    assert set(called) <= set(rl.__all__)
    assert all(hasattr(rl, name) for name in rl.__all__)
