"""Whole folders, PyTorch <-> JAX, of any size: one tensor is in memory at a time.

A PyTorch folder is a diffusers pipeline, or one model of it or of transformers, with safetensors. Its JAX counterpart
is the same folder in which `params/`, an Orbax checkpoint of the module's parameters, takes the place of the
safetensors. Everything else (configurations, tokenizer, scheduler) is copied.

The new folder is made under a temporary name beside its place and renamed when it is complete. A journal in it says
which tensors are written, so that a run that was killed goes on.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np
from clvr_jax.convert.families import Family, family_of, torch_class
from clvr_jax.convert.orbax_tree import PARAMS, TreeWriter, check_tree, is_tree, open_tree
from clvr_jax.convert.rules import Entry, check_keys
from clvr_jax.convert.tensors import Spec, lay_out, stored_tensors, write_tensor

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import read_json

Format = Literal["jax", "torch"]
FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_JOURNAL = ".journal"
_STRIP = 32
_HELD_BYTES = 64 * 2**20


class Piece(NamedTuple):
    """One PyTorch tensor: a leaf of the module, or one layer of it (`layer` is None if it is no stack)."""

    entry: Entry
    layer: int | None
    spec: Spec


@dataclass(frozen=True)
class Component:
    """One model of a conversion: where it lies, relative to source and destination, and its tensors in order."""

    name: str
    family: Family
    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(frozen=True)
class Conversion:
    """What a conversion will do; made by `plan`, done by `convert`."""

    source: Path
    to: Format
    dtype: str | None
    components: tuple[Component, ...]
    copied: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Size of all tensors to be written."""
        return sum(component.nbytes for component in self.components)

    @property
    def tensors(self) -> int:
        """Number of tensors to be written, as PyTorch counts them."""
        return sum(len(component.pieces) for component in self.components)


def plan(source: Path, to: Format, dtype: str | None = None) -> Conversion:
    """Finds the models in a folder and checks that every tensor is there and has its shape. Reads headers only.

    Args:
      source: pipeline or model folder, in the other format than `to`.
      to: "jax" or "torch".
      dtype: of floating-point tensors, "float32", "float16" or "bfloat16"; None keeps each as it is, bit for bit.
    Raises: ClvrError naming what is missing, surplus, misshapen or of no known family; UsageError for a source that is
      in the format `to` already.
    """
    if not source.is_dir():
        raise ClvrError(f"{source}: no such folder; give a diffusers or transformers folder, or one converted to jax")
    models = [folder for folder in (source, *sorted(source.iterdir())) if _holds_model(folder)]
    if not models:
        family_of(source)  # says what is wrong with it
        raise ClvrError(f"{source}: has a config.json but no tensors")
    for folder in models:
        if is_tree(folder / PARAMS) == (to == "jax"):
            raise UsageError(f"{folder}: is in the format of {to} already; nothing to convert")
    target = FLOATS[dtype] if dtype else None
    components = tuple(_component(folder, str(folder.relative_to(source)), to, target) for folder in models)
    copied = tuple(path.relative_to(source) for path in sorted(source.rglob("*")) if _is_copied(path, source, models))
    return Conversion(source, to, dtype, components, copied)


def convert(
    conversion: Conversion, destination: Path, *, resume: bool = False, on_tensor: Callable[[str], None] | None = None
) -> list[str]:
    """Does what was planned.

    Args:
      conversion: from `plan`.
      destination: the new folder; must not exist.
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
        (temporary / _JOURNAL).unlink()
        temporary.rename(destination)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ClvrError(f"{destination}: cannot be written ({error.strerror or error})") from error
    return not_finite


def _write(conversion: Conversion, folder: Path, done: dict[str, bool], on_tensor: Callable[[str], None]) -> list[str]:
    for component in conversion.components:
        read = _reader(conversion.source / component.name, conversion.to)
        write, flush, finish = _writer(component, folder / component.name, conversion.to)
        fresh: dict[str, bool] = {}
        held = 0
        for piece in component.pieces:
            name = f"{component.name}/{piece.spec.key}"
            if name not in done:
                values = _laid_out(read(piece), piece, conversion.to)
                write(piece, values)
                fresh[name] = _has_nan(values)
                held += values.nbytes
            if held > _HELD_BYTES or piece is component.pieces[-1]:
                flush()
                with (folder / _JOURNAL).open("a") as journal:
                    journal.writelines(json.dumps(item) + "\n" for item in fresh.items())
                done |= fresh
                fresh, held = {}, 0
            on_tensor(name)
        finish()
    return [name for name, bad in done.items() if bad]


def _reader(folder: Path, to: Format) -> Callable[[Piece], np.ndarray]:
    """Gives a piece in the source's own layout."""
    if to == "jax":
        stored = stored_tensors(folder)
        return lambda piece: stored[piece.spec.key].open()
    arrays = open_tree(folder / PARAMS)

    def read(piece: Piece) -> np.ndarray:
        array = arrays[".".join(map(str, piece.entry.path))]
        return np.asarray((array if piece.layer is None else array[piece.layer]).read().result())

    return read


def _writer(
    component: Component, folder: Path, to: Format
) -> tuple[Callable[[Piece, np.ndarray], None], Callable[[], None], Callable[[], None]]:
    """Takes pieces in the destination's layout; the others put them on the disk and say that it was all."""
    folder.mkdir(parents=True, exist_ok=True)
    if to == "torch":
        places = lay_out(folder, [piece.spec for piece in component.pieces], component.family.file_name)
        return lambda piece, values: write_tensor(places[piece.spec.key], values), lambda: None, lambda: None
    leaves = {piece.entry.path: (piece.entry.shape, piece.spec.dtype) for piece in component.pieces}
    stacked = {piece.entry.path for piece in component.pieces if piece.entry.stacked}
    tree = TreeWriter(folder / PARAMS, leaves, stacked)
    return lambda piece, values: tree.write(piece.entry.path, piece.layer, values), tree.flush, tree.finish


def _laid_out(values: np.ndarray, piece: Piece, to: Format) -> np.ndarray:
    """Source layout -> destination layout and dtype, contiguous."""
    layout = piece.entry.layout
    view = layout.from_torch(values) if to == "jax" else layout.to_torch(values)
    if view.ndim != 2 or view.flags.c_contiguous:
        return np.asarray(view, piece.spec.dtype, "C")
    # A large matrix is turned over in strips that fit the cache: ten times as fast as in one go.
    turned = np.empty(view.shape, piece.spec.dtype)
    for begin in range(0, view.shape[1], _STRIP):
        turned[:, begin : begin + _STRIP] = view[:, begin : begin + _STRIP]
    return turned


def _has_nan(values: np.ndarray) -> bool:
    if values.dtype.kind in "iub":
        return False
    flat = values.reshape(-1)
    step = 1 << 18  # stays in the cache
    if values.dtype == FLOATS["bfloat16"]:
        bits = flat.view(np.uint16)
        return any(int((bits[i : i + step] & 0x7FFF).max()) > 0x7F80 for i in range(0, bits.size, step))
    return any(bool(np.isnan(flat[i : i + step]).any()) for i in range(0, flat.size, step))


def _component(folder: Path, name: str, to: Format, dtype: np.dtype | None) -> Component:
    family = family_of(folder)
    plan = family.entries(read_json(folder / "config.json"))
    if to == "jax":
        stored = stored_tensors(folder)
        check_keys(plan, {key: tensor.shape for key, tensor in stored.items()}, str(folder))
        sources = {key: tensor.dtype for key, tensor in stored.items()}
    else:
        sources = check_tree(folder / PARAMS, plan)
    pieces = tuple(_pieces(plan, sources, to, dtype))
    for entry in plan:
        dtypes = {sources[key].name for key in entry.keys}
        if to == "jax" and dtype is None and len(dtypes) > 1:
            raise ClvrError(
                f"{folder}: {entry.keys[0]} and its like in other layers become one array but are "
                f"{' and '.join(sorted(dtypes))}; give a dtype for all"
            )
    return Component(name, family, pieces, sum(piece.spec.nbytes for piece in pieces))


def _pieces(plan: list[Entry], sources: dict[str, np.dtype], to: Format, dtype: np.dtype | None) -> Iterator[Piece]:
    for entry in plan:
        for number, key in enumerate(entry.keys):
            found = sources[key]
            kept = found if found.kind in "iub" or dtype is None else dtype
            if entry.torch_dtype:  # of counters: 64 bits there, 32 here
                kept = np.dtype(entry.torch_dtype) if to == "torch" else np.dtype(entry.dtype)
            yield Piece(entry, number if entry.stacked else None, Spec(key, entry.torch_shape, kept))


def _holds_model(folder: Path) -> bool:
    if not folder.is_dir() or torch_class(folder) is None:
        return False
    return is_tree(folder / PARAMS) or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _is_copied(path: Path, source: Path, models: list[Path]) -> bool:
    """Everything beside the tensors, hidden files left out."""
    parts = path.relative_to(source).parts
    if not path.is_file() or any(part.startswith(".") for part in parts):
        return False
    owner = next((folder for folder in reversed(models) if path.is_relative_to(folder)), None)
    if owner is None:
        return True
    own = path.relative_to(owner)
    return own.parts[0] != PARAMS and not own.name.endswith((".safetensors", ".safetensors.index.json"))


def _identity(conversion: Conversion) -> str:
    """What must be the same for a killed run to go on."""
    specs = [(c.name, p.spec.key, p.spec.shape, p.spec.dtype.name) for c in conversion.components for p in c.pieces]
    return json.dumps([str(conversion.source.absolute()), conversion.to, specs])


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
