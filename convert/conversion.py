"""Whole folders and single files, PyTorch <-> JAX, of any size: a tensor or two are in memory at a time.

A PyTorch folder is a diffusers pipeline, or one model of it or of transformers, with safetensors. Its JAX counterpart
is the same folder in which `params/`, an Orbax checkpoint of the module's parameters, takes the place of the
safetensors. Everything else (configurations, tokenizer, scheduler) is copied. Black Forest Labs' own single files of
FLUX.2 are read too, and become one model's folder.

The new folder is made under a temporary name beside its place and renamed when it is complete. A journal in it says
which tensors are written, so that a run that was killed goes on.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from clvr_jax.convert.model_card import add_model_card
from clvr_jax.convert.orbax_tree import PARAMS, TreeWriter
from clvr_jax.convert.planning import Component, Conversion, Format, Piece
from clvr_jax.convert.tensors import FLOATS, bits, lay_out, write_tensor

from clvr_jax.errors import ClvrError, UsageError

_JOURNAL = ".journal"
_TILE, _SPACE = (128, 512), 8
_LARGE_BYTES = 256 * 2**20


def convert(
    conversion: Conversion,
    destination: Path,
    *,
    card: str | None = None,
    resume: bool = False,
    on_tensor: Callable[[str], None] | None = None,
) -> list[str]:
    """Does what was planned.

    Args:
      conversion: from `planning.plan`.
      destination: the new folder; must not exist.
      card: README.md of the new folder, unless the source brings one.
      resume: go on with a run of the same conversion that was killed.
      on_tensor: called with "component/key" after each tensor, those of an earlier run included.
    Returns: the tensors ("component/key") that hold a NaN; they are written as they are.
    Raises: UsageError if the destination exists or a killed run is there and `resume` is not set; ClvrError if
      something cannot be written. Then nothing is left behind; a run that is killed leaves its temporary folder.
    """
    if destination.exists():
        raise UsageError(f"{destination}: exists already; choose another name or remove it")
    temporary = destination.with_name(f".{destination.name}.converting")
    identity = _identity(conversion)
    if temporary.exists() and not resume:
        raise UsageError(f"{temporary}: a conversion was stopped here; add --resume to go on with it, or remove it")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        _check_room(conversion, temporary)
        done = _read_journal(temporary / _JOURNAL, identity)
        not_finite = _write(conversion, temporary, done, on_tensor or (lambda name: None))
        for path in conversion.copied:
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(conversion.source / path, temporary / path)
        for name, text in conversion.written.items():
            (temporary / name).write_text(text)
        if card:
            add_model_card(temporary, card)
        (temporary / _JOURNAL).unlink()
        temporary.rename(destination)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ClvrError(f"{destination}: cannot be written ({error.strerror or error})") from error
    return not_finite


def _write(conversion: Conversion, folder: Path, done: dict[str, bool], on_tensor: Callable[[str], None]) -> list[str]:
    for component in conversion.components:
        write, finish = _writer(component, folder / component.name, conversion.to)
        names = {piece: f"{component.name}/{piece.spec.key}" for piece in component.pieces}
        wanted = [piece for piece in component.pieces if names[piece] not in done]
        for name in (name for name in names.values() if name in done):
            on_tensor(name)
        with (folder / _JOURNAL).open("a") as journal:
            for piece, values, has_nan in _ahead(component, conversion.to, wanted):
                write(piece, values)
                done[names[piece]] = has_nan
                journal.write(json.dumps([names[piece], has_nan]) + "\n")
                journal.flush()
                on_tensor(names[piece])
        finish()
    return [name for name, bad in done.items() if bad]


def _ahead(component: Component, to: Format, pieces: list[Piece]) -> Iterator[tuple[Piece, np.ndarray, bool]]:
    """Each piece as it is written, and whether it holds a NaN; the next one is made while this one is used.

    An array holds until the next but one is asked for.
    """
    memory = _Memory()

    def make(number: int, piece: Piece) -> tuple[Piece, np.ndarray, bool]:
        name = "large" if _is_large(piece) else f"turn {number % 2}"
        values = memory(name, _shape(piece, to), piece.spec.dtype)
        filled = _seen_as(component.source, values, piece, to)
        for rows, block in component.read(piece, partial(memory, "source")):
            _copy(block, filled[rows] if filled.ndim else filled)
        return piece, values, _has_nan(values)

    with ThreadPoolExecutor(1) as thread:
        following: Future[Any] | None = None
        for number, piece in enumerate(pieces):
            made = following.result() if following else make(number, piece)
            ahead = pieces[number + 1] if number + 1 < len(pieces) else None
            following = thread.submit(make, number + 1, ahead) if ahead and not _is_large(ahead) else None
            yield made


def _is_large(piece: Piece) -> bool:
    """Too large to have two of them."""
    return piece.spec.nbytes > _LARGE_BYTES


class _Memory:
    """Memory that is used again and again: fresh pages would cost more than what is done in them."""

    def __init__(self) -> None:
        self._blocks: dict[str, np.ndarray] = {}

    def __call__(self, block: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = math.prod(shape) * dtype.itemsize
        if block not in self._blocks or self._blocks[block].size < nbytes:
            self._blocks.pop(block, None)
            self._blocks[block] = np.empty(nbytes, np.uint8)
        return self._blocks[block][:nbytes].view(dtype).reshape(shape)


def _writer(
    component: Component, folder: Path, to: Format
) -> tuple[Callable[[Piece, np.ndarray], None], Callable[[], None]]:
    """Takes pieces in the destination's layout; the other says that it was all."""
    folder.mkdir(parents=True, exist_ok=True)
    if to == "torch":
        places = lay_out(folder, [piece.spec for piece in component.pieces], component.family.file_name)
        return lambda piece, values: write_tensor(places[piece.spec.key], values), lambda: None
    leaves = {piece.entry.path: (piece.entry.shape, piece.spec.dtype) for piece in component.pieces}
    stacked = {piece.entry.path for piece in component.pieces if piece.entry.stacked}
    tree = TreeWriter(folder / PARAMS, leaves, stacked)
    return lambda piece, values: tree.write(piece.entry.path, piece.layer, values), tree.finish


def _shape(piece: Piece, to: Format) -> tuple[int, ...]:
    """Shape of a piece in the destination."""
    if to == "torch":
        return piece.spec.shape
    return piece.entry.shape if piece.layer is None else piece.entry.shape[1:]


def _seen_as(source: Format, values: np.ndarray, piece: Piece, to: Format) -> np.ndarray:
    """A view of the destination's layout in that of the source."""
    layout = piece.entry.layout
    return values if source == to else layout.to_torch(values) if to == "jax" else layout.from_torch(values)


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """Copies, casting if the types differ."""
    if values.dtype == target.dtype:
        # As integers: a bfloat16 is of a type that NumPy does not know, and copied one by one.
        values, target = bits(values), bits(target)
    if values.ndim != 2 or target.flags.c_contiguous:
        np.copyto(target, values, casting="unsafe")
        return
    # A matrix is turned over in tiles, by way of a small copy whose rows do not fall on the same lines of the cache:
    # twenty times as fast as in one go.
    rows, columns = _TILE
    spaced = np.empty((rows, columns + _SPACE), values.dtype)
    for row in range(0, values.shape[0], rows):
        for column in range(0, values.shape[1], columns):
            tile = np.s_[row : row + rows, column : column + columns]
            part = spaced[: len(values[tile]), : values[tile].shape[1]]
            part[...] = values[tile]
            np.copyto(target[tile], part, casting="unsafe")


def _has_nan(values: np.ndarray) -> bool:
    if values.dtype.kind in "iub":
        return False
    flat = values.reshape(-1)
    step = 1 << 18  # stays in the cache
    if values.dtype == FLOATS["bfloat16"]:
        bits = flat.view(np.uint16)
        return any(int((bits[i : i + step] & 0x7FFF).max()) > 0x7F80 for i in range(0, bits.size, step))
    return any(bool(np.isnan(flat[i : i + step]).any()) for i in range(0, flat.size, step))


def _identity(conversion: Conversion) -> str:
    """What must be the same for a killed run to go on."""
    specs = [(c.name, p.spec.key, p.spec.shape, p.spec.dtype.name) for c in conversion.components for p in c.pieces]
    return json.dumps([str(conversion.source.absolute()), conversion.to, conversion.variant, specs])


def _read_journal(path: Path, identity: str) -> dict[str, bool]:
    """Begins a journal, or reads what an earlier run wrote: tensor -> whether it holds a NaN."""
    if not path.exists():
        path.write_text(identity + "\n")
        return {}
    first, *lines = path.read_text().split("\n")
    if first != identity:
        raise ClvrError(f"{path.parent}: was begun for another conversion; remove it")
    complete = lines[:-1]  # what follows the last newline was cut off
    return dict(json.loads(line) for line in complete)


def _check_room(conversion: Conversion, folder: Path) -> None:
    written = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if conversion.nbytes - written > free:
        shutil.rmtree(folder, ignore_errors=True)
        raise ClvrError(
            f"{folder.parent}: {conversion.nbytes / 2**30:.1f} GiB are to be written, {free / 2**30:.1f} GiB are free"
        )
