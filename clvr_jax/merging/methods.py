"""Merging methods for two deltas of one base: DSWM and the methods with which it is compared.

Every method returns base + w_d d_d + w_a d_a; they differ in how they transform the deltas d = W - W_base first.

    dswm     no transformation. Source: CLVR (arXiv 2605.14876).
    linear   no transformation, but the weights are divided by their sum: an average of the two models without the base.
    ties     trims each delta to its largest entries, and averages those that agree with the elected sign.
             Source: TIES-Merging (arXiv 2306.01708), with trimming per tensor instead of over all tensors.
    dare     drops entries at random and rescales the others by 1 / density. Source: DARE (arXiv 2311.03099).

All functions work on blocks of one tensor.
"""

import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.errors import UsageError
from clvr_jax.merging.deltas import add_deltas, delta_of
from clvr_jax.trees import Path, by_pattern, some

Method = Literal["dswm", "linear", "ties", "dare"]
Weight = float | Mapping[str, float]
"""One weight for all tensors, or {regular expression: weight}: the first that matches in a key applies, else 1."""

_DENSITIES = {"ties": 0.2, "dare": 0.1}  # at these, both papers report no loss for a single model
_FORMULAS = {
    "dswm": "W = W_base + w_d (W_distill - W_base) + w_a (W_align - W_base)",
    "linear": "W = (w_d W_distill + w_a W_align) / (w_d + w_a)",
    "ties": "W = W_base + the mean, weighted by w_d and w_a, of the trimmed deltas that have the elected sign",
    "dare": "W = W_base + w_d m_d (W_distill - W_base) / density + w_a m_a (W_align - W_base) / density, "
    "m random with mean density",
}


@dataclass(frozen=True)
class Settings:
    """The configuration of a merge.

    method: one of `Method`. distill_weight, align_weight: one number, or a number per pattern of keys. density: the
    fraction of the entries of each delta that ties and dare keep; None is 0.2 for ties and 0.1 for dare. seed: of the
    random numbers of dare.
    """

    method: Method = "dswm"
    distill_weight: Weight = 1.0
    align_weight: Weight = 1.0
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UsageError(f"method {self.method!r} is none of {', '.join(get_args(Method))}")
        for name, weight in (("distill", self.distill_weight), ("align", self.align_weight)):
            numbers = weight.values() if isinstance(weight, Mapping) else (weight,)
            if not all(map(math.isfinite, numbers)):
                raise UsageError(f"the weight of {name} must be a number, got {weight}")
            if self.method in ("linear", "ties") and min(numbers, default=0) < 0:
                raise UsageError(f"{self.method} averages, so the weight of {name} cannot be negative, got {weight}")
        if self.density is None:
            object.__setattr__(self, "density", _DENSITIES.get(self.method))
        elif self.method not in _DENSITIES:
            raise UsageError(
                f"{self.method} keeps all entries of the deltas; density is for {' and '.join(_DENSITIES)}"
            )
        elif not 0 < self.density <= 1:
            raise UsageError(f"density must be above 0 and at most 1, got {self.density}")

    @property
    def formula(self) -> str:
        """The formula of the method in one line."""
        return _FORMULAS[self.method]

    def weights(self, keys: Iterable[str]) -> dict[str, tuple[float, float]]:
        """Returns key -> weights of distill and align, for `merge_block`.

        Raises: ClvrError for a pattern that is the first match of no key; UsageError if both weights of an average are
          0.
        """
        paths: list[Path] = [(key,) for key in keys]
        sides = [_by_path(weight, paths) for weight in (self.distill_weight, self.align_weight)]
        pairs = {str(path[0]): (float(sides[0][path]), float(sides[1][path])) for path in paths}
        if self.method == "linear":
            if void := [key for key, pair in pairs.items() if not sum(pair)]:
                raise UsageError(f"linear averages, but both weights are 0 for {some(void)}")
            pairs = {key: (w_d / (w_d + w_a), w_a / (w_d + w_a)) for key, (w_d, w_a) in pairs.items()}
        return pairs


DSWM = Settings()
"""The method of the paper, both weights 1."""


@functools.partial(jax.jit, static_argnames=("method", "density", "low_rank"))
def merge_block(
    base: jax.Array,
    distill: jax.Array,
    align: jax.Array,
    weights: tuple[float, float],
    extra: jax.Array | tuple[float, float] | None = None,
    *,
    method: Method = "dswm",
    density: float | None = None,
    low_rank: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Merges a block of one tensor.

    Args:
      base, distill, align: (n,) each, of any dtypes; `align` is its delta in float32 if `low_rank`.
      weights: from `Settings.weights`.
      extra: for ties, the smallest magnitudes to keep of the two deltas; for dare, a random key; else None.
      method, density: from `Settings`.
      low_rank: whether `align` is a delta instead of weights.
    Returns: (n,) in the base's dtype, and (4,) float32: the sums of the squares of the base, of the delta of
      distill and of that of align, and the sum of the deltas' product, before the method transforms them.
    """
    deltas = delta_of(distill, base), align if low_rank else delta_of(align, base)
    sums = _sums(base.astype(jnp.float32), *deltas)
    if method == "ties":
        assert isinstance(extra, tuple)
        deltas = _elect_sign(*deltas, weights, extra)
    elif method == "dare":
        assert density is not None
        assert isinstance(extra, jax.Array)
        deltas = _drop_and_rescale(*deltas, density, extra)
    return add_deltas(base, *deltas, *weights), sums


def _sums(base: jax.Array, distill: jax.Array, align: jax.Array) -> jax.Array:
    dot = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)
    return jnp.stack([dot(base, base), dot(distill, distill), dot(align, align), dot(distill, align)])


def _elect_sign(
    distill: jax.Array, align: jax.Array, weights: tuple[float, float], least: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Returns the contribution of each trimmed delta to the weighted mean of those with the sign of their sum."""
    w_d, w_a = weights
    distill, align = (jnp.where(jnp.abs(c) >= low, c, 0) for c, low in zip((distill, align), least, strict=True))
    sign = jnp.sign(w_d * distill + w_a * align)
    agree_d, agree_a = ((jnp.sign(c) == sign) & (sign != 0) for c in (distill, align))
    total = w_d * agree_d + w_a * agree_a
    total = jnp.where(total == 0, 1, total)
    return jnp.where(agree_d, distill / total, 0), jnp.where(agree_a, align / total, 0)


def _drop_and_rescale(
    distill: jax.Array, align: jax.Array, density: float, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keeps each entry of a delta with probability `density`, rescaled by 1 / density."""
    kept = [jax.random.bernoulli(own, density, distill.shape) for own in jax.random.split(key)]
    return jnp.where(kept[0], distill / density, 0), jnp.where(kept[1], align / density, 0)


def random_key(seed: int, tensor: str, block: int) -> jax.Array:
    """Returns the random key of a block, which depends only on the seed, the tensor's key and the block's index."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(tensor.encode())), block)


def magnitude_threshold(magnitudes: np.ndarray, density: float) -> float:
    """Returns the smallest of the largest `density` of all magnitudes (n,), which are partially sorted in place."""
    first = magnitudes.size - max(1, round(density * magnitudes.size))
    magnitudes.partition(first)
    return float(magnitudes[first])


def _by_path(weight: Weight, paths: list[Path]) -> dict[Path, float]:
    return by_pattern(weight, paths, 1.0) if isinstance(weight, Mapping) else dict.fromkeys(paths, weight)
