"""The reference is generated: every public name has a text, and a test or a page that uses it; docstrings convert."""

import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest

import clvr_jax
import clvr_jax.convert
from tests.docs.pages import GENERATED, ROOT

sys.path.insert(0, str(ROOT / "docs" / "_extensions"))
from docstrings import to_rst

PACKAGES = sorted(
    ".".join([root.__name__, *path.parent.relative_to(directory).parts])
    for root in (clvr_jax, clvr_jax.convert)
    for directory in [Path(root.__path__[0])]
    for path in directory.rglob("__init__.py")
    if "\n__all__ = [" in path.read_text()
)

# Types of results and protocols, and functions that tests reach through others. The set may only become smaller.
WITHOUT_EXAMPLE = {
    "clvr_jax.convert.architectures.MOST_PARAMETERS",
    "clvr_jax.convert.architectures.ModelConfig",
    "clvr_jax.convert.architectures.find_architecture",
    *(f"clvr_jax.cost_model.{name}" for name in ("Chip", "Flops", "Report", "Roofline", "Topology")),
    *(f"clvr_jax.diffusion.{name}" for name in ("ForwardProcess", "Prediction", "append_dims")),
    "clvr_jax.interfaces.Fault",
    "clvr_jax.interfaces.Message",
    "clvr_jax.pipelines.sdxl.SDXLOutput",
    "clvr_jax.rewards.EditJudge",
    "clvr_jax.rewards.ImageJudge",
    *(f"clvr_jax.rl.{name}" for name in ("Advantages", "GradAccumulator", "Predictor", "Rollout")),
    "clvr_jax.tasks.flux2.flow_matching_task",
    "clvr_jax.tasks.sdxl.noise_prediction_task",
    "clvr_jax.tasks.sdxl.sdxl_policy",
    "clvr_jax.training.objectives.sample_timesteps",
    "clvr_jax.worlds.shapes.CANVAS",
    "clvr_jax.worlds.shapes.Diff",
}


@pytest.fixture(scope="module")
def uses():
    """The words of tests, recipes and pages."""
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    texts = [path.read_text() for path in files if path != Path(__file__) and GENERATED not in path.parents]
    return set(re.findall(r"\w+", "\n".join(texts)))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_explained(package):
    module = importlib.import_module(package)
    assert module.__doc__
    items = {name: getattr(module, name) for name in module.__all__}
    defined = [name for name, item in items.items() if inspect.isclass(item) or inspect.isroutine(item)]
    assert [name for name in defined if not inspect.getdoc(items[name])] == []


def test_public_names_are_in_a_test_or_on_a_page(uses):
    names = {f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__}
    assert {name for name in names if name.rpartition(".")[2] not in uses} == WITHOUT_EXAMPLE


def test_docstrings_become_restructured_text():
    docstring = """\
        Returns the sum of `a`s and b_.

            x = add(1, 2)

        Args:
          a, b: numbers, of any
            *kind*.
          c: `None` for 0.

        Returns: their sum,
          rounded.
        Raises: ClvrError if a|b overflows.
        * one `item`
          that continues
        * another"""
    assert to_rst(textwrap.dedent(docstring).splitlines()) == [
        r"Returns the sum of ``a``\ s and b\_.",
        "",
        "::",
        "",
        "       x = add(1, 2)",
        "",
        "**Args:**",
        "",
        r"* ``a, b``: numbers, of any \*kind\*.",
        "* ``c``: ``None`` for 0.",
        "",
        "**Returns:** their sum, rounded.",
        "",
        r"**Raises:** ClvrError if a\|b overflows.",
        "",
        "* one ``item`` that continues",
        "* another",
        "",
    ]
