"""The three inputs of a merge in their own format: weights of a model, or a LoRA file. Reads headers only.

Tensors have PyTorch's keys in both formats, and keep the axis order of their format, which does not affect a merge.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np

from clvr_jax.checkpoint_io.blocks import Buffers
from clvr_jax.checkpoint_io.journal import reading
from clvr_jax.checkpoint_io.orbax_tree import PARAMS
from clvr_jax.checkpoint_io.tensors import FLOATS, StoredTensor, bits, stored_tensors
from clvr_jax.convert.architectures import torch_class
from clvr_jax.convert.lora.files import Factors, find_lora, read_factors
from clvr_jax.convert.streaming.conversion import shape_in
from clvr_jax.convert.streaming.planning import PipelineComponent, TensorSlice, model_in
from clvr_jax.errors import ClvrError
from clvr_jax.merging.digests import Digests
from clvr_jax.models.common.adapters import WeightAdapter
from clvr_jax.models.common.lora import LoRAPair
from clvr_jax.trees import some

Role = Literal["base", "distill", "align"]
GENERATORS = ("transformer", "unet")
"""Directory of the image generator in a pipeline, which is the model that is merged."""

_FORMATS = {"torch": "safetensors", "jax": "an Orbax checkpoint"}


@dataclass(frozen=True)
class Origin:
    """The origin of an input: the user's text, its local path, and the commit of a Hugging Face id."""

    name: str
    path: Path
    revision: str | None = None

    @classmethod
    def of(cls, source: "Path | Origin") -> "Origin":
        """Returns an origin as it is, and the origin of a path."""
        return source if isinstance(source, Origin) else cls(str(source), source)


@dataclass(frozen=True)
class Weights:
    """A complete model.

    role: which input of the merge. origin: its path, or that of its pipeline. component: the model; its name is its
    directory in the pipeline, "." if `origin.path` is the model itself. stored: key -> location of each tensor.
    """

    role: Role
    origin: Origin
    component: PipelineComponent
    stored: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def directory(self) -> Path:
        """The directory of the model."""
        return self.origin.path / self.component.name

    @cached_property
    def slices(self) -> dict[str, TensorSlice]:
        """Its tensors by key."""
        return {tensor_slice.spec.key: tensor_slice for tensor_slice in self.component.slices}

    @property
    def dtypes(self) -> list[str]:
        """The names of the dtypes of its floating-point tensors."""
        return sorted(
            {tensor_slice.spec.dtype.name for tensor_slice in self.component.slices if is_weight(tensor_slice)}
        )

    @cached_property
    def digests(self) -> Digests:
        """The sha256 of its files, by their names in its directory."""
        if self.component.source == "jax":
            return Digests({f"{PARAMS}/": self.directory / PARAMS})
        files = sorted({tensor.file for tensor in self.stored.values()})
        return Digests({file.name: file for file in files})

    def values(self, key: str, buffers: Buffers) -> np.ndarray:
        """Returns a tensor in the axis order of its format: memory-mapped, or assembled in a buffer of this input."""
        tensor_slice = self.slices[key]
        shape = shape_in(tensor_slice, self.component.source)
        assembled: np.ndarray | None = None
        with reading(f"{self.directory}: {key}"):
            for rows, block in self.component.read(tensor_slice, partial(buffers, f"{self.role}, as read")):
                if assembled is None:
                    if block.shape == shape:
                        return block
                    assembled = buffers(self.role, shape, tensor_slice.spec.dtype)
                bits(assembled)[rows] = bits(block)
        assert assembled is not None, key
        return assembled


@dataclass(frozen=True)
class LoRADelta:
    """A LoRA of the base's model."""

    role: Role
    origin: Origin
    base: Weights
    file: Path
    factors: Mapping[str, Factors | WeightAdapter] = field(repr=False)

    @property
    def dtypes(self) -> list[str]:
        """The names of the dtypes of its tensors."""
        return sorted({tensor.dtype.name for own in self.factors.values() for tensor in own.tensors.values()})

    @cached_property
    def digests(self) -> Digests:
        """The sha256 of its file."""
        return Digests({self.file.name: self.file})

    def delta(self, key: str, base: np.ndarray) -> np.ndarray | None:
        """Returns its delta of a tensor in float32 and in the base's format; None for one that it does not adapt.

        Args:
          key: of the tensor.
          base: the tensor of the base, which DoRA needs.
        """
        factors = self.factors.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if factors is None:
            return None
        entry, is_torch = self.base.slices[key].entry, self.base.component.source == "torch"
        if isinstance(factors, WeightAdapter):
            weight = base if is_torch else entry.transform.to_torch(base)
            product = np.asarray(factors.delta(weight.astype(np.float32)))
        else:
            rank = factors.down.shape[0]
            pair = LoRAPair(factors.up.reshape(-1, rank), factors.down.reshape(rank, -1), factors.scale)
            product = np.asarray(pair.product()).reshape(entry.torch_shape)
        return product if is_torch else np.asarray(entry.transform.from_torch(product))


def is_weight(tensor_slice: TensorSlice) -> bool:
    """Returns whether a tensor is merged; counters are not."""
    return tensor_slice.spec.dtype.kind not in "iub"


def open_weights(role: Role, source: Path | Origin) -> Weights:
    """Opens the model in a directory, or the transformer (UNet) of the pipeline in it.

    Raises: ClvrError for a single file, a directory without a model, or a model with missing tensors.
    """
    origin = Origin.of(source)
    path = origin.path
    if path.is_file():
        raise ClvrError(
            f"{role}: {origin.name} is a single file, and formats are not mixed; convert it with "
            f"`clvr convert {origin.name} DIRECTORY --to torch` and give the directory"
        )
    if not path.is_dir():
        raise ClvrError(f"{role}: {origin.name}: no such directory")
    name = "."
    if torch_class(path) is None:
        name = next((generator for generator in GENERATORS if (path / generator).is_dir()), ".")
    component = model_in(path / name, name)
    if odd := sorted({p.spec.dtype.name for p in component.slices if is_weight(p)} - FLOATS.keys()):
        raise ClvrError(
            f"{role}: {path / name} contains {', '.join(odd)}, which float32 does not represent exactly; "
            f"convert it first with --dtype, to one of {', '.join(FLOATS)}"
        )
    stored = stored_tensors(path / name) if component.source == "torch" else {}
    return Weights(role, origin, component, stored)


def open_tuned(role: Role, source: Path | Origin, base: Weights, force: bool = False) -> Weights:
    """Opens a model that was tuned from `base`, with the same architecture, format, tensors and configuration.

    Args:
      role: which input of the merge.
      source: its path.
      base: the opened base.
      force: allow other fields in config.json that do not change the tensors.
    Raises: ClvrError, which lists the differences of both sides.
    """
    tuned = open_weights(role, source)
    kinds = [side.component.architecture.torch_class for side in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise ClvrError(f"{role}: {tuned.directory} is a {kinds[1]}, the base a {kinds[0]}")
    formats = [side.component.source for side in (base, tuned)]
    if formats[0] != formats[1]:
        raise ClvrError(
            f"{role}: {tuned.directory} contains {_FORMATS[formats[1]]}, the base {_FORMATS[formats[0]]}; formats are "
            f"not mixed: `clvr convert {tuned.origin.name} DIRECTORY --to {formats[0]}` makes them equal"
        )
    _check_same(base, tuned)
    settings = [_settings(side.component) for side in (base, tuned)]
    names = sorted(name for name in settings[0] if settings[0][name] != settings[1].get(name))
    if names and not force:
        listed = some(f"{name} (base {settings[0][name]}, {role} {settings[1].get(name)})" for name in names)
        raise ClvrError(f"{role}: {tuned.directory} has other settings than the base: {listed}; --force merges anyway")
    return tuned


def open_align(
    source: Path | Origin, base: Weights, force: bool = False, ignore_text_encoder: bool = False
) -> Weights | LoRADelta:
    """Opens the aligned input: a model that was tuned from `base`, or a LoRA file or its directory.

    Args:
      source: its path.
      base: the opened base.
      force: as for `open_tuned`.
      ignore_text_encoder: leave out tensors of a LoRA that adapt a text encoder, which are an error otherwise.
    Raises: ClvrError under the same conditions as `open_tuned`, and for a LoRA that is damaged or of another model.
    """
    origin = Origin.of(source)
    file = find_lora(origin.path) if origin.path.exists() else None
    if file is None:
        return open_tuned("align", origin, base, force)
    kernels = [tensor_slice for tensor_slice in base.component.slices if tensor_slice.entry.path[-1] == "kernel"]
    shapes = {tensor_slice.spec.key.removesuffix(".weight"): tensor_slice.spec.shape for tensor_slice in kernels}
    return LoRADelta("align", origin, base, file, read_factors(file, shapes, ignore_text_encoder))


def _settings(component: PipelineComponent) -> dict[str, object]:
    config = component.architecture.config_from_dict(component.config)
    return dataclasses.asdict(config)


def _check_same(base: Weights, tuned: Weights) -> None:
    ours, theirs = base.slices, tuned.slices
    differing = [
        f"{key} (base {_described(ours[key])}, {tuned.role} {_described(theirs[key])})"
        for key in ours
        if key in theirs and _described(ours[key]) != _described(theirs[key])
    ]
    sides = (
        ("only in base", [key for key in ours if key not in theirs]),
        (f"only in {tuned.role}", [key for key in theirs if key not in ours]),
        ("of another shape or kind", differing),
    )
    if faults := [f"{len(names)} {title}: {some(names)}" for title, names in sides if names]:
        raise ClvrError(f"{tuned.role}: {tuned.directory} does not match the base; {'; '.join(faults)}")


def _described(tensor_slice: TensorSlice) -> str:
    return f"{'floating' if is_weight(tensor_slice) else tensor_slice.spec.dtype.name} {tensor_slice.spec.shape}"
