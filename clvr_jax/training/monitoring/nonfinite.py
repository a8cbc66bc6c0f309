"""A line in the log for steps whose loss or gradients are not finite."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

StepMetrics = Mapping[str, jax.Array | float]


def nonfinite_report(
    name: str, unit: str, iteration: int, pending: Sequence[StepMetrics], before: int, skipped: int
) -> str | None:
    """Returns a line that names the first iteration with a step that was not finite; None if there is none.

    Args:
      name: of the task. unit: of iterations, "step" or "epoch".
      iteration: number of finished iterations.
      pending: metrics of the last iterations, with "skipped", the number of such steps since the run began.
      before: that number before these iterations. skipped: after them.
    """
    if skipped <= before:
        return None
    numbers = range(iteration - len(pending) + 1, iteration + 1)
    where, values = iteration, {}
    for number, metrics in zip(numbers, pending, strict=True):
        if float(metrics.get("skipped", before)) > before:
            where = number
            values = {key: float(np.asarray(metrics[key])) for key in ("loss", "grad_norm") if key in metrics}
            break
    found = [f"{key.replace('_', ' ')} {value}" for key, value in values.items() if not math.isfinite(value)]
    text = ", ".join(found) or "loss or gradients are not finite"
    count = skipped - before
    steps = "1 optimizer step was skipped" if count == 1 else f"{count} optimizer steps were skipped"
    since = f" of {unit} {numbers[0]} to {iteration}" if len(pending) > 1 else ""
    return f"{name}: {unit} {where}: {text}; {steps}{since}, which changed no parameters"
