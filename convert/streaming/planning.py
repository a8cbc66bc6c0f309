"""The plan of a conversion: the models of a source, their tensors and other files. Reads headers only."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from clvr_jax.checkpoint_io.orbax_tree import PARAMS, Block, Memory, is_tree, open_tree
from clvr_jax.checkpoint_io.tensors import FLOATS, PICKLES, StoredTensor, TensorSpec, read_header, stored_tensors
from clvr_jax.convert.architectures import WITHOUT_MODULE, Architecture, architecture_of, find_architecture, torch_class
from clvr_jax.convert.rules import Entry, check_dtypes, check_keys, check_tree
from clvr_jax.convert.single_file import flux2 as flux2_single_file
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import located, read_json
from clvr_jax.files.json_input import UncheckedJSON

Format = Literal["jax", "torch"]

# Weights in formats that are not read, which published directories contain beside the safetensors.
_OTHER_WEIGHTS = {*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".pb", ".xml"}


class TensorSlice(NamedTuple):
    """One PyTorch tensor: a leaf of the module, or one layer of a stacked leaf.

    entry: the leaf. layer: index of the layer; None if the leaf is not stacked. spec: key, shape and dtype to write.
    """

    entry: Entry
    layer: int | None
    spec: TensorSpec


Reader = Callable[[TensorSlice, Memory], Iterator[Block]]
"""(slice, allocator) -> its values in the source's axis order, in blocks of rows: memory-mapped, or read into memory
from the allocator."""


@dataclass(frozen=True)
class PipelineComponent:
    """One model of a conversion.

    name: its directory relative to source and destination. config: its config.json. source: format of what `read`
    yields. slices: its tensors in order. where: the directory or file that it is read from. files: the files that
    contain its tensors.
    """

    name: str
    architecture: Architecture
    config: UncheckedJSON
    source: Format
    slices: tuple[TensorSlice, ...]
    read: Reader
    where: Path = Path()
    files: tuple[Path, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of its tensors in the destination, in bytes."""
        return sum(tensor_slice.spec.nbytes for tensor_slice in self.slices)


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: created by `plan`, executed by `convert`.

    to: format of the destination. dtype: of floating-point tensors, None to keep each. variant: of the source's files.
    copied: files, relative to the source, that are copied unchanged. written: name -> text of further files of the
    destination. without_module: component -> class, for models that are copied because there is no NNX module.
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
        """Size of all tensors and files to write, in bytes."""
        copied = sum((self.source / path).stat().st_size for path in self.copied)
        return copied + sum(component.nbytes for component in self.components)

    @property
    def tensors(self) -> int:
        """Number of PyTorch tensors to write."""
        return sum(len(component.slices) for component in self.components)

    @property
    def models(self) -> dict[str, tuple[str, UncheckedJSON]]:
        """PipelineComponent -> (PyTorch's class, config.json)."""
        return {component.name: (component.architecture.torch_class, component.config) for component in self.components}


def plan(source: Path, to: Format, dtype: str | None = None, variant: str | None = None) -> Conversion:
    """Finds the models in a directory and checks the keys and shapes of all tensors. Reads headers only.

    Args:
      source: directory of a pipeline or model, or a single file of FLUX.2.
      to: "jax" or "torch".
      dtype: of floating-point tensors, "float32", "float16" or "bfloat16"; None keeps each as it is, bit for bit.
      variant: which of several sets of files, for example "fp16"; see `model_file`.
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
        raise ClvrError(
            f"{source}: no such file or directory; give a diffusers or transformers directory or a FLUX.2 file"
        )
    found = [directory for directory in (source, *sorted(source.iterdir())) if _holds_model(directory)]
    unsupported = {directory.name: name for directory in found if (name := torch_class(directory)) in WITHOUT_MODULE}
    models = [directory for directory in found if directory.name not in unsupported]
    if not models:
        architecture_of(source)  # raises an error with the reason
        raise ClvrError(f"{source}: has a config.json but no tensors")
    if dtype is None and all(is_tree(directory / PARAMS) == (to == "jax") for directory in models):
        raise UsageError(f"{source}: is in the format of {to} already; nothing to convert (--dtype would change it)")
    components = tuple(
        _component(_directory_model(directory, variant), str(directory.relative_to(source)), to, target)
        for directory in models
    )
    return Conversion(source, to, dtype, variant, components, files_beside(source, models), {}, unsupported)


def model_in(directory: Path, name: str = ".") -> PipelineComponent:
    """Returns the model in one directory in its own format and dtypes.

    Args:
      directory: of one model, in either format.
      name: of the component.
    Raises: ClvrError under the same conditions as `plan`.
    """
    model = _directory_model(directory, None)
    return _component(model, name, model.format, None)


def files_beside(source: Path, models: Sequence[Path]) -> tuple[Path, ...]:
    """Returns the files in `source`, relative to it, without hidden files and the tensors of the given models."""
    return tuple(path.relative_to(source) for path in sorted(source.rglob("*")) if _is_copied(path, source, models))


class _Model(NamedTuple):
    """A model in its source format: the correspondence with its tensors, their dtypes and the function to read one."""

    where: Path
    architecture: Architecture
    config: UncheckedJSON
    format: Format
    plan: list[Entry]
    dtypes: dict[str, np.dtype]
    read: Reader
    files: tuple[Path, ...]


def _directory_model(directory: Path, variant: str | None) -> _Model:
    architecture, config = architecture_of(directory), read_json(directory / "config.json")
    with located(directory):
        plan = architecture.entries(config)
    if is_tree(directory / PARAMS):
        dtypes = check_tree(directory / PARAMS, plan)
        check_dtypes(plan, dtypes, str(directory))
        return _Model(
            directory,
            architecture,
            config,
            "jax",
            plan,
            dtypes,
            _leaf_reader(directory / PARAMS),
            _files_in(directory / PARAMS),
        )
    stored = architecture.canonicalize_keys(stored_tensors(directory, variant), architecture.config_from_dict(config))
    check_keys(plan, {key: tensor.shape for key, tensor in stored.items()}, str(directory))
    dtypes = {key: tensor.dtype for key, tensor in stored.items()}
    check_dtypes(plan, dtypes, str(directory))
    files = tuple({tensor.file: None for tensor in stored.values()})
    return _Model(directory, architecture, config, "torch", plan, dtypes, _tensor_reader(stored), files)


def _files_in(directory: Path) -> tuple[Path, ...]:
    return tuple(path for path in sorted(directory.rglob("*")) if path.is_file())


def _file_model(file: Path, config: UncheckedJSON, stored: Mapping[str, StoredTensor]) -> _Model:
    architecture = find_architecture(config["_class_name"])
    assert architecture is not None
    parts = flux2_single_file.diffusers_tensors(stored)
    dtypes, plan = {key: part.dtype for key, part in parts.items()}, architecture.entries(config)
    check_dtypes(plan, dtypes, str(file))
    return _Model(file, architecture, config, "torch", plan, dtypes, _tensor_reader(parts), (file,))


def _leaf_reader(directory: Path) -> Reader:
    arrays = open_tree(directory)
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
                f"{model.where}: {entry.keys[0]} and the same tensor of other layers become one array, but have "
                f"dtypes {' and '.join(sorted(dtypes))}; give a dtype for all"
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
            if entry.torch_dtype:  # counters have 64 bits in PyTorch and 32 here
                kept = np.dtype(entry.torch_dtype) if to == "torch" else np.dtype(entry.dtype)
            yield TensorSlice(entry, number if entry.stacked else None, TensorSpec(key, entry.torch_shape, kept))


def _holds_model(directory: Path) -> bool:
    if not directory.is_dir() or torch_class(directory) is None:
        return False
    return is_tree(directory / PARAMS) or any(directory.glob("*.safetensors")) or any(directory.glob("*.bin"))


def _is_copied(path: Path, source: Path, models: Sequence[Path]) -> bool:
    parts = path.relative_to(source).parts
    if any(part.startswith(".") for part in parts) or path.is_dir():
        return False
    if not path.is_file():
        raise ClvrError(f"{path}: a broken link, or no file; fetch it again, or remove it")
    owner = next((directory for directory in reversed(models) if path.is_relative_to(directory)), None)
    if owner is None:
        return True
    is_weight = path.suffix in _OTHER_WEIGHTS or ".safetensors.index." in path.name
    return path.relative_to(owner).parts[0] != PARAMS and not is_weight
