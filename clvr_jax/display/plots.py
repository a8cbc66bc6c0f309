"""Plots with matplotlib, which is optional."""

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_plot() -> bool:
    """Returns whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def literal(text: object) -> str:
    """Returns a text with escaped "$", which would otherwise begin a formula; an invalid formula is an error."""
    return str(text).replace("$", r"\$")


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of a size in inches, without a window and without global state."""
    from matplotlib.figure import Figure  # pyplot would keep global state

    return Figure(figsize=(width, height), layout="constrained")
