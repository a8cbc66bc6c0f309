"""Plots, where matplotlib is installed; the package does without them elsewhere."""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_plot() -> bool:
    """Whether matplotlib is installed, which nothing else of the package needs."""
    return importlib.util.find_spec("matplotlib") is not None


def literal(text: object) -> str:
    """A text for a plot as it is; "$" would begin a formula, and a formula that cannot be read ends the plot."""
    return str(text).replace("$", r"\$")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches; it has no window and leaves no state behind."""
    from matplotlib.figure import Figure  # not pyplot, which has both

    return Figure(figsize=(width, height), layout="constrained")
