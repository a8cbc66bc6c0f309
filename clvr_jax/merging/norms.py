"""The norms of two deltas relative to their base and the cosine between them: per tensor, per layer and in total."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LAYER = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class DeltaStatistics:
    """Sums over the entries of some tensors: squares of the base and of the two deltas, and the deltas' product."""

    base: float = 0.0
    distill: float = 0.0
    align: float = 0.0
    product: float = 0.0

    def __add__(self, other: "DeltaStatistics") -> "DeltaStatistics":
        return DeltaStatistics(*(one + two for one, two in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, float, float, float]:
        """The four sums in the order of `merge_block`."""
        return self.base, self.distill, self.align, self.product

    @property
    def relative(self) -> dict[str, float | None]:
        """The relative Frobenius norms |delta| / |base| of distill and align; None if the base is 0."""
        sides = {"distill": self.distill, "align": self.align}
        return {side: math.sqrt(square / self.base) if self.base else None for side, square in sides.items()}

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the deltas as vectors; None if one is 0."""
        length = math.sqrt(self.distill) * math.sqrt(self.align)
        return self.product / length if length else None

    def to_json(self) -> dict[str, float | None]:
        """Returns the norm of the base, the relative norms and the cosine for JSON."""
        return {"base_norm": math.sqrt(self.base), **self.relative, "cosine": self.cosine}


def total(sums: Iterable[DeltaStatistics]) -> DeltaStatistics:
    """Adds the statistics of several tensors."""
    return sum(sums, DeltaStatistics())


def layer_of(key: str) -> str:
    """Returns the layer of a tensor: its block with the block's index, else its module."""
    numbered = _LAYER.match(key)
    return numbered[0] if numbered else key.rpartition(".")[0] or key


def by_layer(sums: Mapping[str, DeltaStatistics]) -> dict[str, DeltaStatistics]:
    """Returns layer -> statistics for key -> statistics, with blocks in the order of their indices."""
    layers: defaultdict[str, DeltaStatistics] = defaultdict(DeltaStatistics)
    for key, own in sums.items():
        layers[layer_of(key)] += own
    return {name: layers[name] for name in sorted(layers, key=_by_number)}


def _by_number(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
