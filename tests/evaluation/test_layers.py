"""The packages of evaluation import only from those below them, as CONTRIBUTING.md says."""

import ast
from pathlib import Path

import clvr_jax.evaluation

ROOT = Path(clvr_jax.evaluation.__file__).parent
LAYERS = ["statistics", "systems", "harness", "judging", "benchmarks", "comparison", "reporting"]
LAYERS += ["verifier", "planning", "steps", "paper"]


def imported(path):
    """The parts of evaluation that a module imports, those that it imports inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clvr_jax.evaluation"):
            names = node.module.split(".")[2:3] or [alias.name for alias in node.names]
            yield from names


def test_no_import_runs_upward():
    found = {path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py")}
    assert found - {"__init__"} == set(LAYERS)
    for path in ROOT.rglob("*.py"):
        own = path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0]
        if own != "__init__":
            upward = [name for name in imported(path) if LAYERS.index(name) > LAYERS.index(own)]
            assert not upward, f"{path}: imports {upward}"
