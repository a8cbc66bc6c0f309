"""Plans: assigns a color and a cell to each object that metadata asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.metadata import RELATIONS, Item, Metadata
from clvr_jax.worlds.shapes.scene import CELLS, COLORS, HELD_OUT_PAIRS, check_names

_FREE_ORDER = tuple(
    CELLS.index(cell)
    for cell in ("center", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
)
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class PlannedObject:
    """An object of a plan: color, shape and cell; `str` gives the words of controllers, "red star top left"."""

    color: str
    shape: str
    cell: str

    def __post_init__(self) -> None:
        check_names(self.color, self.shape, self.cell)

    def __str__(self) -> str:
        return f"{self.color} {self.shape} {self.cell}"


def holds(relation: str, cell: str, anchor: str) -> bool:
    """Returns whether plans may place an object in `cell` so that it has the relation to an object in `anchor`.

    Plans avoid diagonals, which are ambiguous; `counts` accepts them.
    """
    return CELLS.index(cell) in _RELATED[relation][CELLS.index(anchor)]


def counts(relation: str, cell: str, anchor: str) -> bool:
    """Returns whether an object in `cell` is accepted as having the relation to an object in `anchor`.

    A diagonal neighbor is accepted in both directions: the checker, which measures centers by GenEval's rule, accepts
    .998 of them over all sizes and positions in the cells.
    """
    ahead, aside = _offsets(relation, CELLS.index(cell), CELLS.index(anchor))
    return ahead > 0 and ahead >= aside


def _offsets(relation: str, cell: int, anchor: int) -> tuple[int, int]:
    """Returns the distance of an object from its anchor in cells: along the relation (signed), and across it."""
    down, across = _DIRECTIONS[relation]
    rows, columns = cell // 3 - anchor // 3, cell % 3 - anchor % 3
    return (rows * down, abs(columns)) if down else (columns * across, abs(rows))


def _related(relation: str, anchor: int) -> tuple[int, ...]:
    """Returns the cells that have the relation to the anchor, the nearest aligned cell first."""
    offsets = [(*_offsets(relation, cell, anchor), cell) for cell in range(len(CELLS))]
    return tuple(cell for _, _, cell in sorted((aside, ahead, cell) for ahead, aside, cell in offsets if ahead > aside))


_RELATED = {relation: tuple(_related(relation, anchor) for anchor in range(len(CELLS))) for relation in RELATIONS}


def plan(
    metadata: Metadata, rng: np.random.Generator | None = None, allow_held_out: bool = False
) -> tuple[PlannedObject, ...]:
    """Assigns a color and a cell to each object of the metadata so that the checker accepts the result.

    Without `rng` the plan is canonical. Objects are placed in the order of the include list, by these rules:

    * an item with a place takes it, and the cell stays free for it until then;
    * an item with a relation takes a cell on that side of its anchor, the nearest aligned one first;
    * an item to which later items have relations prefers cells that leave room on those sides, for example the right
      edge if something is to be left of it;
    * any other item takes the first free cell of: center, the four sides, the corners.

    If no cell is left, the search backtracks. This is rare (.07 of requests for six objects, .34 without the third
    rule), since a small model cannot learn to search. A color that the metadata leaves open is the first of COLORS.

    Args:
      metadata: as `parse_metadata` returns it.
      rng: samples a random satisfying plan (colors and cells) instead; the order of the objects stays.
      allow_held_out: colors that the metadata leaves open may form HELD_OUT_PAIRS (random plans only).
    Returns: one PlannedObject per object; the items of the include list in order, groups together.
    Raises: ClvrError if no arrangement satisfies the metadata.
    """
    items = [item for item in metadata["include"] for _ in range(item["count"])]
    owners = [index for index, item in enumerate(metadata["include"]) for _ in range(item["count"])]
    cells = next(_assignments(metadata, owners, rng), None)
    if cells is None:
        raise ClvrError(f"no arrangement of the 3 x 3 cells satisfies the prompt {metadata['prompt']!r}")
    return tuple(
        PlannedObject(
            item["color"] if "color" in item else _free_color(item["class"], rng, allow_held_out),
            item["class"],
            CELLS[cell],
        )
        for item, cell in zip(items, cells, strict=True)
    )


def _free_color(shape: str, rng: np.random.Generator | None, allow_held_out: bool) -> str:
    names = [color for color in COLORS if allow_held_out or (color, shape) not in HELD_OUT_PAIRS]
    return names[0] if rng is None else names[int(rng.integers(len(names)))]


def _assignments(metadata: Metadata, owners: list[int], rng: np.random.Generator | None) -> Iterator[list[int]]:
    """Searches the cells depth first, object by object; yields complete assignments in order of preference."""
    include = metadata["include"]
    reserved = {CELLS.index(item["place"]) for item in include if "place" in item}
    roomy = [_roomy_order(sides) for sides in _sides_needed(include)]
    chosen: list[int] = []

    def candidates(owner: int) -> list[int]:
        item = include[owner]
        options: tuple[int, ...] = roomy[owner] or _FREE_ORDER
        if "position" in item:
            relation, target = item["position"]
            anchors = [cell for cell, other in zip(chosen, owners, strict=False) if other == target]
            options = _RELATED[relation][anchors[0]]
            for anchor in anchors[1:]:
                options = tuple(cell for cell in options if cell in _RELATED[relation][anchor])
            if roomy[owner]:
                options = tuple(sorted(options, key=roomy[owner].index))
        if "place" in item:
            place = CELLS.index(item["place"])
            return [place] if place in options and place not in chosen else []
        free = [cell for cell in options if cell not in chosen and cell not in reserved]
        return free if rng is None else [free[i] for i in rng.permutation(len(free))]

    def extend() -> Iterator[list[int]]:
        if len(chosen) == len(owners):
            yield list(chosen)
            return
        for cell in candidates(owners[len(chosen)]):
            chosen.append(cell)
            yield from extend()
            chosen.pop()

    return extend()


def _sides_needed(include: list[Item]) -> list[set[str]]:
    """Returns for each item the relations that later items have to it."""
    needed: list[set[str]] = [set() for _ in include]
    for item in include:
        if "position" in item:
            relation, target = item["position"]
            needed[target].add(relation)
    return needed


def _roomy_order(sides: set[str]) -> tuple[int, ...]:
    """Returns the cells ordered by the room that they leave on the given sides, () if no side is needed."""
    if not sides:
        return ()
    row, column = _opposite(sides, "above", "below"), _opposite(sides, "left of", "right of")

    def cost(cell: int) -> tuple[int, int, int]:
        down, across = divmod(cell, 3)
        from_edge = sum(abs(at - wanted) for at, wanted in ((down, row), (across, column)) if wanted is not None)
        from_middle = sum(abs(at - 1) for at, wanted in ((down, row), (across, column)) if wanted is None)
        return from_edge, from_middle, cell

    return tuple(sorted(range(len(CELLS)), key=cost))


def _opposite(sides: set[str], before: str, after: str) -> int | None:
    """Returns the row or column (0, 1, 2) that leaves most room on the sides needed, None if neither is needed."""
    if before in sides:
        return 1 if after in sides else 2
    return 0 if after in sides else None
