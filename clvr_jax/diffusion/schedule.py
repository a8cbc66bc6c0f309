"""Noise levels of the FLUX.2 sampler: evenly spaced, then shifted towards noise as size and steps ask for."""

import math

import numpy as np

from clvr_jax.errors import UsageError


def empirical_mu(image_tokens: int, steps: int) -> float:
    """The exponent of the shift.

    Two straight lines in the number of tokens, fitted by the model's authors at 10 and at 200 steps, and a straight
    line in the number of steps between them; large pictures use the second alone.

    Args:
      image_tokens: tokens of the picture being drawn, references not counted.
      steps: solver steps.
    Source: compute_empirical_mu (Flux2KleinPipeline, diffusers).
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def flow_sigmas(steps: int, image_tokens: int) -> np.ndarray:
    """The solver's noise levels: (steps + 1,) float32, from 1 down to 0.

    sigma' = e^mu / (e^mu + 1 / sigma - 1) over sigma = 1, 1 - 1/n, ..., 1/n, then 0.
    Source: FlowMatchEulerDiscreteScheduler with dynamic exponential shifting, as Flux2KleinPipeline calls it.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    sigmas = np.linspace(1.0, 1.0 / steps, steps)
    shift = math.exp(empirical_mu(image_tokens, steps))
    return np.append(shift / (shift + 1.0 / sigmas - 1.0), 0.0).astype(np.float32)
