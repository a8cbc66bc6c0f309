"""What a conversion will do: the models of a source, their tensors, and the files beside them. Reads headers only."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from clvr_jax.convert import flux2_single_file
from clvr_jax.convert.architectures import WITHOUT_MODULE, Architecture, architecture_of, find_architecture, torch_class
from clvr_jax.convert.orbax_tree import PARAMS, Block, Memory, check_tree, is_tree, open_tree
from clvr_jax.convert.rules import Entry, check_dtypes, check_keys
from clvr_jax.convert.tensors import FLOATS, PICKLES, StoredTensor, TensorSpec, read_header, stored_tensors

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import located, read_json

Format = Literal["jax", "torch"]

# Weights in formats that are not read, which published folders hold beside the safetensors.
_OTHER_WEIGHTS = {*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".xml"}


class TensorSlice(NamedTuple):
    """One PyTorch tensor: a leaf of the module, or one layer of it (`layer` is None if it is no stack)."""

    entry: Entry
    layer: int | None
    spec: TensorSpec


Reader = Callable[[TensorSlice, Memory], Iterator[Block]]
"""Gives a tensor_slice in the source's layout, in blocks of rows: mapped, or read into the memory offered."""


@dataclass(frozen=True)
class PipelineComponent:
    """One model of a conversion: its place relative to source and destination, and its tensors in order.

    config: its config.json. source: format that `read` gives. where: it is stored. files: that hold its tensors.
    """

    name: str
    architecture: Architecture
    config: Mapping[str, Any]
    source: Format
    slices: tuple[TensorSlice, ...]
    read: Reader
    where: Path = Path()
    files: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of its tensors in the destination."""
        return sum(tensor_slice.spec.nbytes for tensor_slice in self.slices)


@dataclass(frozen=True)
class Conversion:
    """What a conversion will do; made by `plan`, done by `convert`.

    copied: files, relative to the source, that are taken as they are. written: further files of the destination.
    without_module: components with weights that are copied because no module of ours reads them, with their class.
    """

    source: Path
    to: Format
    dtype: str | None
    variant: str | None
    components: tuple[PipelineComponent, ...]
    copied: tuple[Path, ...]
    written: Mapping[str, str]
    without_module: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Size of all tensors and files to be written."""
        copied = sum((self.source / path).stat().st_size for path in self.copied)
        return copied + sum(component.nbytes for component in self.components)

    @property
    def tensors(self) -> int:
        """Number of tensors to be written, as PyTorch counts them."""
        return sum(len(component.slices) for component in self.components)

    @property
    def models(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """PipelineComponent -> (PyTorch's class, config.json)."""
        return {component.name: (component.architecture.torch_class, component.config) for component in self.components}


def plan(source: Path, to: Format, dtype: str | None = None, variant: str | None = None) -> Conversion:
    """Finds the models in a folder and checks that every tensor is there and has its shape. Reads headers only.

    Args:
      source: pipeline or model folder, or a single file of FLUX.2.
      to: "jax" or "torch".
      dtype: of floating-point tensors, "float32", "float16" or "bfloat16"; None keeps each as it is, bit for bit.
      variant: which of several sets of files, "fp16" say, see `model_file`.
    Raises: ClvrError naming what is missing, unexpected, of another shape or of an unknown architecture; UsageError for
      a source that is in the requested format already.
    """
    target = FLOATS[dtype] if dtype else None
    if source.is_file():
        stored = {tensor.key: tensor for tensor in read_header(source)}
        config = flux2_single_file.config_of(stored)
        component = _component(_file_model(source, config, stored), ".", to, target)
        files: dict[str, str] = {"config.json": json.dumps(config, indent=2) + "\n"}
        return Conversion(source, to, dtype, variant, (component,), (), files, {})
    if not source.is_dir():
        raise ClvrError(f"{source}: no such file or folder; give a diffusers or transformers folder or a FLUX.2 file")
    found = [folder for folder in (source, *sorted(source.iterdir())) if _holds_model(folder)]
    strangers = {folder.name: name for folder in found if (name := torch_class(folder)) in WITHOUT_MODULE}
    models = [folder for folder in found if folder.name not in strangers]
    if not models:
        architecture_of(source)  # says what is wrong with it
        raise ClvrError(f"{source}: has a config.json but no tensors")
    if dtype is None and all(is_tree(folder / PARAMS) == (to == "jax") for folder in models):
        raise UsageError(f"{source}: is in the format of {to} already; nothing to convert (--dtype would change it)")
    components = tuple(
        _component(_folder_model(folder, variant), str(folder.relative_to(source)), to, target) for folder in models
    )
    return Conversion(source, to, dtype, variant, components, files_beside(source, models), {}, strangers)


def model_in(folder: Path, name: str = ".") -> PipelineComponent:
    """The model in one folder as it lies there: its slices have the dtypes that they have in the files.

    Args:
      folder: of one model, in either format.
      name: of the component.
    Raises: ClvrError as `plan` does.
    """
    model = _folder_model(folder, None)
    return _component(model, name, model.format, None)


def files_beside(source: Path, models: Sequence[Path]) -> tuple[Path, ...]:
    """Everything in `source` but the tensors of the models in these folders, relative to it; hidden files left out."""
    return tuple(path.relative_to(source) for path in sorted(source.rglob("*")) if _is_copied(path, source, models))


class _Model(NamedTuple):
    """A model as it lies there: the correspondence with its tensors, their dtypes, and how one is read."""

    where: Path
    architecture: Architecture
    config: Mapping[str, Any]
    format: Format
    plan: list[Entry]
    dtypes: dict[str, np.dtype]
    read: Reader
    files: tuple[Path, ...]


def _folder_model(folder: Path, variant: str | None) -> _Model:
    architecture, config = architecture_of(folder), read_json(folder / "config.json")
    with located(folder):
        plan = architecture.entries(config)
    if is_tree(folder / PARAMS):
        dtypes = check_tree(folder / PARAMS, plan)
        check_dtypes(plan, dtypes, str(folder))
        return _Model(
            folder, architecture, config, "jax", plan, dtypes, _leaf_reader(folder / PARAMS), _files_in(folder / PARAMS)
        )
    stored = architecture.canonicalize_keys(stored_tensors(folder, variant), architecture.config_from_dict(config))
    check_keys(plan, {key: tensor.shape for key, tensor in stored.items()}, str(folder))
    dtypes = {key: tensor.dtype for key, tensor in stored.items()}
    check_dtypes(plan, dtypes, str(folder))
    files = tuple({tensor.file: None for tensor in stored.values()})
    return _Model(folder, architecture, config, "torch", plan, dtypes, _tensor_reader(stored), files)


def _files_in(folder: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file())


def _file_model(file: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> _Model:
    architecture = find_architecture(config["_class_name"])
    assert architecture is not None
    parts = flux2_single_file.diffusers_tensors(stored)
    dtypes, plan = {key: part.dtype for key, part in parts.items()}, architecture.entries(config)
    check_dtypes(plan, dtypes, str(file))
    return _Model(file, architecture, config, "torch", plan, dtypes, _tensor_reader(parts), (file,))


def _leaf_reader(folder: Path) -> Reader:
    arrays = open_tree(folder)
    return lambda tensor_slice, memory: arrays[".".join(map(str, tensor_slice.entry.path))].blocks(
        tensor_slice.layer, memory
    )


def _tensor_reader(tensors: Mapping[str, StoredTensor | flux2_single_file.Part]) -> Reader:
    return lambda tensor_slice, memory: iter([(slice(None), tensors[tensor_slice.spec.key].open())])


def _component(model: _Model, name: str, to: Format, dtype: np.dtype | None) -> PipelineComponent:
    for entry in model.plan:
        dtypes = {model.dtypes[key].name for key in entry.keys}
        if to == "jax" and dtype is None and len(dtypes) > 1:
            raise ClvrError(
                f"{model.where}: {entry.keys[0]} and its like in other layers become one array but are "
                f"{' and '.join(sorted(dtypes))}; give a dtype for all"
            )
    slices = tuple(_tensor_slices(model.plan, model.dtypes, to, dtype))
    return PipelineComponent(
        name, model.architecture, model.config, model.format, slices, model.read, model.where, model.files
    )


def _tensor_slices(
    plan: list[Entry], sources: dict[str, np.dtype], to: Format, dtype: np.dtype | None
) -> Iterator[TensorSlice]:
    for entry in plan:
        for number, key in enumerate(entry.keys):
            found = sources[key]
            kept = found if found.kind in "iub" or dtype is None else dtype
            if entry.torch_dtype:  # of counters: 64 bits there, 32 here
                kept = np.dtype(entry.torch_dtype) if to == "torch" else np.dtype(entry.dtype)
            yield TensorSlice(entry, number if entry.stacked else None, TensorSpec(key, entry.torch_shape, kept))


def _holds_model(folder: Path) -> bool:
    if not folder.is_dir() or torch_class(folder) is None:
        return False
    return is_tree(folder / PARAMS) or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _is_copied(path: Path, source: Path, models: Sequence[Path]) -> bool:
    parts = path.relative_to(source).parts
    if not path.is_file() or any(part.startswith(".") for part in parts):
        return False
    owner = next((folder for folder in reversed(models) if path.is_relative_to(folder)), None)
    if owner is None:
        return True
    is_weight = path.suffix in _OTHER_WEIGHTS or ".safetensors.index." in path.name
    return path.relative_to(owner).parts[0] != PARAMS and not is_weight
