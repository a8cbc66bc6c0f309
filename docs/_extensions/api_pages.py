"""Writes a page for each package with public names: those in the `__all__` of its `__init__`."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from docstrings import to_rst
from generated import write_pages
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import clvr_jax
import clvr_jax.convert

ROOTS = {"clvr_jax": Path(clvr_jax.__path__[0]), "clvr_jax.convert": Path(clvr_jax.convert.__path__[0])}
MODULES = ("clvr_jax.sharding", "clvr_jax.errors")
"""Modules that are public as a whole."""


def public_packages() -> Iterator[str]:
    """Yields the names of all packages that export something, in alphabetical order."""
    found = set(MODULES)
    for root, directory in ROOTS.items():
        for path in directory.rglob("__init__.py"):
            if "\n__all__ = [" in path.read_text(encoding="utf-8"):
                parts = path.parent.relative_to(directory).parts
                found.add(".".join([root, *parts]))
    yield from sorted(found)


def api_page(package: str, indexed: set[int]) -> str:
    """Returns the reStructuredText of a package: its docstring and its public names.

    Args:
      package: its full name.
      indexed: ids of classes that an earlier page has, and to which links lead there; those of this page are added.
    """
    module = importlib.import_module(package)
    origins = _origins(module)
    names = getattr(module, "__all__", None) or [name for name in origins if not name.startswith("_")]
    title = f"``{package}``"
    parts = [title, "=" * len(title), "", *to_rst(inspect.cleandoc(module.__doc__ or "").splitlines())]
    for name in names:
        item = getattr(module, name)
        if inspect.isclass(item):
            again = ["   :no-index:"] if id(item) in indexed else []
            parts += [f".. autoclass:: {package}.{name}", "   :members:", *again, ""]
            indexed.add(id(item))
        elif inspect.isroutine(item) or hasattr(item, "__wrapped__"):
            parts += [f".. autofunction:: {package}.{name}", ""]
        else:
            text = to_rst(_comment(origins[name], name))
            parts += [f".. py:data:: {package}.{name}", "", *(f"   {line}".rstrip() for line in text), ""]
    return "\n".join(parts)


def _origins(module: ModuleType) -> dict[str, str]:
    """Returns name -> module that defines it, for the names that a module imports or defines."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("clvr_jax"):
            found |= {name.name: node.module for name in node.names if hasattr(module, "__all__")}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = module.__name__
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: module.__name__ for target in targets if isinstance(target, ast.Name)}
    return found


def _comment(module: str, name: str) -> list[str]:
    """Returns the text after the definition of a constant; of one that a package exports again, where it is defined."""
    found = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name))
    if found is None:
        origin = _origins(importlib.import_module(module)).get(name, module)
        return _comment(origin, name) if origin != module else []
    return list(found)


def _write(app: Sphinx) -> None:
    indexed: set[int] = set()
    write_pages(
        Path(app.srcdir) / "reference" / "generated" / "api",
        ".rst",
        "# Python\n\nThe public names of each package. What is not listed is private and may change.",
        {package: api_page(package, indexed) for package in public_packages()},
    )


def setup(app: Sphinx) -> dict[str, object]:
    """Writes the pages before they are read."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True}
