"""What a conversion will write and whether it computes the same, as tables for people and as data."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clvr_jax.convert.planning import Conversion
from clvr_jax.convert.verify import TOLERANCE, Agreement
from rich.table import Table

if TYPE_CHECKING:
    from clvr_jax.convert.verify import Agreement


def conversion_table(conversion: Conversion) -> Table:
    """One row for each tensor of the destination, a sum for each model."""
    table = Table(
        "tensor",
        "shape",
        "dtype",
        "bytes",
        title=f"{conversion.source} to {conversion.to}: {readable_size(conversion.nbytes)}",
    )
    for component in conversion.components:
        name = conversion.source.name if component.name == "." else component.name
        title = f"{name}: {component.family.title}, {len(component.pieces)} tensors"
        table.add_row(title, "", "", readable_size(component.nbytes), style="bold")
        for piece in component.pieces:
            shape, spec = " x ".join(map(str, piece.spec.shape)), piece.spec
            table.add_row(spec.key, shape, spec.dtype.name, readable_size(spec.nbytes))
        table.add_section()
    for path in conversion.copied:
        table.add_row(str(path), "", "file", "copied")
    return table


def tensor_list(conversion: Conversion) -> list[dict[str, Any]]:
    """The same for scripts: model, key, shape, dtype and bytes of each tensor."""
    return list(_tensors(conversion))


def agreement_table(agreements: Sequence["Agreement"]) -> Table:
    """One row for each model that was run in both frameworks."""
    caption = f"agree: at most {TOLERANCE:g} of the largest value of an output, in float32"
    table = Table("model", "architecture", title="our outputs and PyTorch's", caption=caption)
    for column in ("largest difference", "relative"):
        table.add_column(column, justify="right")
    table.add_column("")
    for agreement in agreements:
        apart = ", ".join(agreement.apart)
        verdict, style = (f"differ: {apart}", "red") if apart else ("agree", None)
        numbers = f"{agreement.largest:.2g}", f"{agreement.relative:.2g}"
        table.add_row(agreement.component, agreement.title, *numbers, verdict, style=style)
    return table


def agreement_list(agreements: Sequence["Agreement"]) -> list[dict[str, Any]]:
    """The same for scripts; null for a difference that is no number, because JSON has no NaN."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return [
        {
            "model": agreement.component,
            "architecture": agreement.title,
            "largest": number(agreement.largest),
            "relative": number(agreement.relative),
            "outputs": {name: number(relative) for name, relative in agreement.outputs.items()},
            "agrees": agreement.agrees,
        }
        for agreement in agreements
    ]


def _tensors(conversion: Conversion) -> Iterator[dict[str, Any]]:
    for component in conversion.components:
        for piece in component.pieces:
            spec = piece.spec
            yield {
                "model": component.name,
                "key": spec.key,
                "shape": list(spec.shape),
                "dtype": spec.dtype.name,
                "bytes": spec.nbytes,
            }


def readable_size(nbytes: int) -> str:
    """Bytes in the unit that suits them."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
