"""The rows that are generated in one call: how many, and with references of which sizes."""

from collections.abc import Callable

from clvr_jax.errors import UsageError
from clvr_jax.pipelines.flux2.kept_latents import Reference


def split_rows(rows: list[int], rows_per_call: int | None) -> list[list[int]]:
    """Splits rows into the calls that compute them; see `Flux2Pipeline.generate_each`."""
    if rows_per_call is None:
        return _powers_of_two(rows)
    if rows_per_call < 1 or rows_per_call & (rows_per_call - 1):
        raise UsageError(f"rows_per_call must be a power of two, got {rows_per_call}")
    return [rows[start : start + rows_per_call] for start in range(0, len(rows), rows_per_call)]


def any_row(rows: list[int], on_step: Callable[[int, int, int], bool]) -> Callable[[int, int], bool]:
    """Returns a function of (steps done, all steps): it calls `on_step` for each row; whether any is still wanted."""

    def called(done: int, steps: int) -> bool:
        return any([on_step(row, done, steps) for row in rows])

    return called


def _powers_of_two(rows: list[int]) -> list[list[int]]:
    """Splits rows into the fewest parts of 1, 2, 4, ... rows, which are the batch sizes that are compiled.

    No part is padded: a few images use a device fully, so a padded row would cost as much as another image.
    """
    parts = []
    while rows:
        size = 1 << (len(rows).bit_length() - 1)
        parts.append(rows[:size])
        rows = rows[size:]
    return parts


def common_sizes(references: list[list[Reference]]) -> list[tuple[int, int]]:
    """Returns height and width of each reference of a row. Raises: UsageError if they differ between rows."""
    sizes = [[reference.size for reference in row] for row in references]
    if any(row != sizes[0] for row in sizes):
        raise UsageError(
            "rows of one batch must have references of the same number and sizes; generate the others in another batch"
        )
    return sizes[0]
