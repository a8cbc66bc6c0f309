"""The tensors that a conversion will write, as a table and as JSON data."""

from collections.abc import Iterator

from rich.table import Table

from clvr_jax.convert.streaming.planning import Conversion
from clvr_jax.files.json_input import JSON


def conversion_table(conversion: Conversion) -> Table:
    """Returns a table with one row per tensor of the destination and the total size of each model."""
    table = Table(
        "tensor",
        "shape",
        "dtype",
        "bytes",
        title=f"{conversion.source} to {conversion.to}: {readable_size(conversion.nbytes)}",
    )
    for component in conversion.components:
        name = conversion.source.name if component.name == "." else component.name
        title = f"{name}: {component.architecture.title}, {len(component.slices)} tensors"
        table.add_row(title, "", "", readable_size(component.nbytes), style="bold")
        for tensor_slice in component.slices:
            shape, spec = " x ".join(map(str, tensor_slice.spec.shape)), tensor_slice.spec
            table.add_row(spec.key, shape, spec.dtype.name, readable_size(spec.nbytes))
        table.add_section()
    for path in conversion.copied:
        table.add_row(str(path), "", "file", "copied")
    return table


def tensor_list(conversion: Conversion) -> list[dict[str, JSON]]:
    """Returns model, key, shape, dtype and bytes of each tensor of the destination, for JSON."""
    return list(_tensors(conversion))


def _tensors(conversion: Conversion) -> Iterator[dict[str, JSON]]:
    for component in conversion.components:
        for tensor_slice in component.slices:
            spec = tensor_slice.spec
            yield {
                "model": component.name,
                "key": spec.key,
                "shape": list(spec.shape),
                "dtype": spec.dtype.name,
                "bytes": spec.nbytes,
            }


def readable_size(nbytes: int) -> str:
    """Formats a number of bytes in B, KiB, MiB or GiB."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
