"""The additivity of two deltas in the network's prediction, and the angle between their increments.

Delta-space merging assumes additivity: near the base the network is nearly linear in its weights, so that the
increments of its prediction add (P3 of the paper), and those of distillation and of alignment are nearly orthogonal
(P4). The increment of a delta d scaled by s is f(W + s d) - f(W), which can be measured on any prompt and noise level.

Base and deltas should be float32: in bfloat16, the sums of weights themselves are not additive.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from clvr_jax.merging.deltas import apply_delta
from clvr_jax.trees import Params

Predict = Callable[[Params], PyTree]
"""Parameters -> prediction, an array or a tree of arrays, traceable by JAX; for example the velocity of one batch."""


@dataclass(frozen=True)
class Interaction:
    """The comparison of the increments of two deltas that are scaled by `scale`.

    additivity_error: |f(W + d + a) - f(W) - df_d - df_a| / |f(W + d + a) - f(W)|; 0 if they add.
    angle: between df_d and df_a, in degrees; 90 if they do not interact.
    distill, align: |df_d| / |f(W)| and |df_a| / |f(W)|.
    All are NaN if their divisor is 0.
    """

    scale: float
    additivity_error: float
    angle: float
    distill: float
    align: float


def interaction(predict: Predict, base: Params, distill: Params, align: Params, scale: float = 1.0) -> Interaction:
    """Compares the increments of two deltas of one network for one input.

    Args:
      predict: parameters -> prediction.
      base: full weights.
      distill, align: deltas of the base, as the function `delta` returns them, or LoRA trees.
      scale: of both deltas; 0 is the limit, in which the increments are derivatives and the error is 0.
    """
    if scale == 0:
        before, of_distill = _derivative(predict, base, distill)
        _, of_align = _derivative(predict, base, align)
        return Interaction(0.0, 0.0, angle(of_distill, of_align), 0.0, 0.0)
    before = predict(base)
    with_distill = apply_delta(base, distill, scale)
    of_distill = _minus(predict(with_distill), before)
    of_align = _minus(predict(apply_delta(base, align, scale)), before)
    of_both = _minus(predict(apply_delta(with_distill, align, scale)), before)
    rest = _minus(_minus(of_both, of_distill), of_align)
    length = _norm(before)
    return Interaction(
        float(scale),
        _ratio(_norm(rest), _norm(of_both)),
        angle(of_distill, of_align),
        _ratio(_norm(of_distill), length),
        _ratio(_norm(of_align), length),
    )


def over_noise_levels(
    predict: Callable[[Params, jax.Array], PyTree],
    base: Params,
    distill: Params,
    align: Params,
    sigmas: Iterable[float],
) -> dict[float, Interaction]:
    """Returns sigma -> `interaction` at that noise level.

    Args:
      predict: (parameters, sigma) -> prediction; the caller chooses noise and prompt.
      base, distill, align: as for `interaction`.
      sigmas: noise levels, from 0 to 1.
    """
    compiled = jax.jit(predict)

    def at(sigma: float) -> Predict:
        return lambda params: compiled(params, sigma)

    return {float(sigma): interaction(at(sigma), base, distill, align) for sigma in sigmas}


def over_scales(
    predict: Predict, base: Params, distill: Params, align: Params, scales: Iterable[float] = (0.0, 0.5, 1.0, 1.5, 2.0)
) -> dict[float, Interaction]:
    """Returns scale -> `interaction` with both deltas scaled by it; the error rises where the network is nonlinear."""
    compiled = jax.jit(predict)
    return {float(scale): interaction(compiled, base, distill, align, float(scale)) for scale in scales}


def angle(one: PyTree, other: PyTree) -> float:
    """Returns the angle between two trees of arrays as vectors, in degrees; NaN if one of them is 0."""
    # From half the angle: the cosine of an angle near 0 or 180 degrees has no significant digits.
    lengths = _norm(one), _norm(other)
    if not all(lengths):
        return math.nan
    units = [jax.tree.map(lambda leaf, n=n: leaf / n, tree) for tree, n in zip((one, other), lengths, strict=True)]
    return math.degrees(2 * math.atan2(_norm(_minus(*units)), _norm(jax.tree.map(jnp.add, *units))))


def _derivative(predict: Predict, base: Params, delta: Params) -> tuple[PyTree, PyTree]:
    """Returns the prediction and its derivative in the direction of a delta."""
    return jax.jvp(lambda scale: predict(apply_delta(base, delta, scale)), (jnp.zeros(()),), (jnp.ones(()),))


def _minus(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32), one, other)


def _norm(tree: PyTree) -> float:
    return math.sqrt(sum(float(jnp.sum(jnp.square(jnp.asarray(leaf, jnp.float32)))) for leaf in jax.tree.leaves(tree)))


def _ratio(part: float, total: float) -> float:
    return part / total if total else math.nan
