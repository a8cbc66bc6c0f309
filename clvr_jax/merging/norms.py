"""How large two changes are beside their base, and the angle between them: by tensor, by layer, over all."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LAYER = re.compile(r".*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Sums:
    """Sums over the entries of some tensors: squares of the base and of the two changes, and their product."""

    base: float = 0.0
    distill: float = 0.0
    align: float = 0.0
    product: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(one + two for one, two in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[float, float, float, float]:
        """As `merge_block` gives them."""
        return self.base, self.distill, self.align, self.product

    @property
    def relative(self) -> dict[str, float | None]:
        """distill, align -> |change| / |base| (Frobenius), None if the base is 0."""
        sides = {"distill": self.distill, "align": self.align}
        return {side: math.sqrt(square / self.base) if self.base else None for side, square in sides.items()}

    @property
    def cosine(self) -> float | None:
        """Of the angle between the changes as vectors; None if one is 0."""
        length = math.sqrt(self.distill) * math.sqrt(self.align)
        return self.product / length if length else None

    def described(self) -> dict[str, float | None]:
        """For JSON."""
        return {"base_norm": math.sqrt(self.base), **self.relative, "cosine": self.cosine}


def total(sums: Iterable[Sums]) -> Sums:
    """Over several tensors."""
    return sum(sums, Sums())


def layer_of(key: str) -> str:
    """What a tensor is a part of: a block with its number, else a module."""
    numbered = _LAYER.match(key)
    return numbered[0] if numbered else key.rpartition(".")[0] or key


def by_layer(sums: Mapping[str, Sums]) -> dict[str, Sums]:
    """Key -> sums becomes layer -> sums, blocks in the order of their numbers."""
    layers: defaultdict[str, Sums] = defaultdict(Sums)
    for key, own in sums.items():
        layers[layer_of(key)] += own
    return {name: layers[name] for name in sorted(layers, key=_by_number)}


def _by_number(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
