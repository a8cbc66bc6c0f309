"""The packages depend on each other as the tables of CONTRIBUTING.md say."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REASONING = ["conversation", "verification", "trajectories", "loop"]
"""The packages of clvr_jax.reasoning, each below the next."""
REASONING_MODULES = {"seeds", "retries"}
"""The modules of clvr_jax.reasoning, which all its packages may import."""


def layers() -> dict[str, int]:
    """Package or module of clvr_jax -> its layer; 0 for modules that it does not name."""
    found = {}
    rows = re.findall(r"^\| (`.+?) \| (\d) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    for names, layer in rows:
        for name in re.findall(r"`([^`]+)`", names):
            found[name.strip("/").removeprefix("clvr_jax/").removesuffix(".py")] = int(layer)
    return found


def without_types(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from without_types(child)


def imports(package: str, nodes: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk) -> dict[str, set[str]]:
    """Part of a package -> the other parts of it that are imported there, inside functions included.

    nodes: those of a module that count; by default all.
    """
    depth = package.count(".") + 1
    full = package if package.startswith("clvr_jax") else f"clvr_jax.{package}"  # convert/ is at the top
    paths = [(path, path.relative_to(ROOT).parts) for path in (ROOT / package.replace(".", "/")).rglob("*.py")]
    if package == "clvr_jax":
        paths += [(path, ("clvr_jax", "convert")) for path in (ROOT / "convert").rglob("*.py")]
    found: dict[str, set[str]] = {}
    for path, parts in paths:
        own = parts[depth].removesuffix(".py")
        if own == "__init__" or (own == "configs" and depth == 1):
            continue
        for node in nodes(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                modules = [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            imported = {module.split(".")[full.count(".") + 1] for module in modules if module.startswith(f"{full}.")}
            found.setdefault(own, set()).update(imported - {own})
    return found


@pytest.mark.slow
def test_no_import_runs_to_a_higher_layer():
    layer, found = layers(), imports("clvr_jax")
    packages = {path.parent.name for path in (ROOT / "clvr_jax").glob("*/__init__.py")} - {"configs"}
    assert packages <= set(layer)
    assert set(found) >= {"reasoning", "rl", "convert", "errors"}
    upward = {(own, name) for own, names in found.items() for name in names if layer.get(name, 0) > layer.get(own, 0)}
    assert not upward


@pytest.mark.slow
def test_packages_do_not_import_each_other_in_a_cycle():
    found = imports("clvr_jax")
    found["commands"].remove("cli")  # one row of the table: the workers of `clvr launch` run `clvr`
    assert {"errors", "files", "reasoning", "rl", "tasks"} <= set(found)
    TopologicalSorter(found).prepare()


def packages() -> list[str]:
    """All packages below clvr_jax, those of convert/ included."""
    paths = [*(ROOT / "clvr_jax").rglob("__init__.py"), *(ROOT / "convert").rglob("__init__.py")]
    return [".".join(path.parent.relative_to(ROOT).parts) for path in paths if path.parent != ROOT / "clvr_jax"]


@pytest.mark.parametrize("package", packages())
def test_parts_of_a_package_do_not_import_each_other_in_a_cycle(package):
    """A name for a type checker may come from above: a part of `Service` names the service in its annotations."""
    TopologicalSorter(imports(package, without_types)).prepare()


def test_the_imports_inside_packages_are_found():
    assert {"errors", "replicas"} <= imports("clvr_jax.serving", without_types)["service"]
    assert "service" in imports("clvr_jax.serving")["replicas"]
    assert "service" not in imports("clvr_jax.serving", without_types)["replicas"]
    assert "rules" in imports("convert")["models"]


def test_packages_of_reasoning_import_only_from_those_below():
    found = imports("clvr_jax.reasoning")
    assert set(found) == {*REASONING, *REASONING_MODULES}
    for own, names in found.items():
        below = [] if own in REASONING_MODULES else REASONING[: REASONING.index(own)]
        assert names <= {*below, *REASONING_MODULES}
