"""Tensors in diffusers/transformers directories: one safetensors file, or shards with an index.

At most one tensor is in memory: reading maps the bytes of a tensor on request, and writing stores one tensor after
another at its offset in a preallocated file.

Format: https://huggingface.co/docs/safetensors (8 bytes length, a JSON header, the tensors' bytes without gaps).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from clvr_jax.checkpoint_io.disk import PAGE, put
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json

DIFFUSERS_NAME = "diffusion_pytorch_model"
TRANSFORMERS_NAME = "model"
SHARD_BYTES = 5 * 2**30
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}

FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that floating-point tensors can be converted to."""

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Key, shape and dtype of a tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in a file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a safetensors file, and the offset of its first byte there."""

    file: Path
    offset: int

    def open(self) -> np.ndarray:
        """Returns the tensor read-only and memory-mapped: bytes are read when they are used."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


Tensors = dict[str, StoredTensor]
"""The tensors of one model: key -> location."""


def model_file(directory: Path, variant: str | None = None) -> Path:
    """Returns the safetensors file of the model in `directory`, or the index of its shards.

    Args:
      directory: of one model.
      variant: which of several sets of files, for example "fp16"; a model without this variant is read from its files
        without a variant, as in diffusers.
    Raises: ClvrError if there is no such file.
    """
    plain = ("{name}.safetensors.index.json", "{name}.safetensors")
    forms = (f"{{name}}.safetensors.index.{variant}.json", f"{{name}}.{variant}.safetensors") if variant else ()
    names = (DIFFUSERS_NAME, TRANSFORMERS_NAME)
    candidates = (directory / form.format(name=name) for form in (*forms, *plain) for name in names)
    found: Path | None = next((path for path in candidates if path.exists()), None)
    if found is not None:
        return found
    lacks = f"{directory}: neither {DIFFUSERS_NAME}.safetensors nor {TRANSFORMERS_NAME}.safetensors (or their index)"
    if others := sorted(path.name for path in directory.glob("*.safetensors*")):
        raise ClvrError(f"{lacks}, but {others[0]}; choose one as in NAME.fp16.safetensors with --variant fp16")
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise ClvrError(
            f"{directory}: {pickles[0]} is a pickle, which can run code on loading; save the model as safetensors"
        )
    raise ClvrError(lacks)


def stored_tensors(directory: Path, variant: str | None = None) -> Tensors:
    """Returns the location of each tensor of the model in `directory`. Reads headers only.

    Raises: ClvrError for files that are missing, truncated or of another format, a key in two shards, or an index that
      is wrong or names shards that are absent.
    """
    file = model_file(directory, variant)
    if file.suffix != ".json":
        return {stored.key: stored for stored in read_header(file)}
    listed = read_json(file).get("weight_map", {})
    # A shard is a file in this directory: a name from a file is never used as a path.
    if not isinstance(listed, dict) or not all(isinstance(n, str) and is_file_name(n) for n in listed.values()):
        raise ClvrError(f"{file}: weight_map must be an object of tensors and names of files beside it")
    shards = [directory / shard for shard in sorted(set(listed.values()))]
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent or not shards:
        raise ClvrError(f"{file}: names shards that are absent: {', '.join(absent) or '(none listed)'}")
    tensors: Tensors = {}
    for shard in shards:
        for stored in read_header(shard):
            if stored.key in tensors:
                raise ClvrError(f"{shard}: {stored.key} is in {tensors[stored.key].file.name} too")
            tensors[stored.key] = stored
    wrong = [key for key, name in listed.items() if key not in tensors or tensors[key].file.name != name]
    if wrong:
        raise ClvrError(f"{file}: lists {wrong[0]} in a shard that does not contain it ({len(wrong)} such keys)")
    return tensors


def without_tied_head(tensors: Tensors, embeddings: str, head: str = "lm_head.weight") -> Tensors:
    """Leaves out the head of a language model that is stored beside the embeddings to which it is tied.

    Raises: ClvrError if the two differ: then the model is not tied, contrary to its config.json.
    """
    if head not in tensors or embeddings not in tensors:
        return tensors
    ours, theirs = tensors[embeddings], tensors[head]
    step = max(1, ours.shape[0] // 64)  # in parts, so that little memory is resident
    same = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and all(
        np.array_equal(bits(ours.open()[row : row + step]), bits(theirs.open()[row : row + step]))
        for row in range(0, ours.shape[0], step)
    )
    if not same:
        raise ClvrError(
            f"{theirs.file}: {head} differs from {embeddings}, but config.json says tie_word_embeddings; one is wrong"
        )
    return {key: tensor for key, tensor in tensors.items() if key != head}


def is_file_name(name: str) -> bool:
    """Returns whether a string from a file is a plain file name, which cannot lead out of a directory."""
    return (
        Path(name).name == name not in ("", ".", "..")
        and "\0" not in name
        and len(name.encode(errors="replace")) <= 255
    )


def bits(values: np.ndarray) -> np.ndarray:
    """Returns a view as unsigned integers: exact to compare, and fast to copy for types that NumPy lacks."""
    return values.view(f"u{values.dtype.itemsize}")


def read_header(path: Path) -> list[StoredTensor]:
    """Returns the tensors of one safetensors file in the order of their offsets.

    Raises: ClvrError for a file that is missing, truncated or of another format.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block forever
        raise ClvrError(f"{path}: not a file; fetch or convert it again")
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library validates the header against the size of the file
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ClvrError(f"{path}: not a complete safetensors file ({error}); fetch or convert it again") from error
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys())
    if unknown:
        raise ClvrError(f"{path}: tensors of type {', '.join(unknown)} are not supported")
    tensors = [
        StoredTensor(key, tuple(entry["shape"]), _DTYPES[entry["dtype"]], path, 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
    ]
    return sorted(tensors, key=lambda stored: stored.offset)


def preallocate_files(
    directory: Path, specs: Iterable[TensorSpec], name: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, StoredTensor]:
    """Creates `name`.safetensors, or shards of at most `shard_bytes` with an index, with headers and without data.

    Existing files with the same header keep their data. `directory` should be a temporary directory, which is renamed
    when all tensors are written.
    Returns: key -> location of each tensor, for `write_tensor`.
    """
    shards: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if spec.nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    files = [f"{name}.safetensors"]
    if len(shards) > 1:
        files = [f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {spec.key: file for file, shard in zip(files, shards, strict=True) for spec in shard}
        total = sum(spec.nbytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {
        stored.key: stored
        for file, shard in zip(files, shards, strict=True)
        for stored in _preallocate_file(directory / file, shard)
    }


def write_tensor(stored: StoredTensor, tensor: np.ndarray) -> None:
    """Writes a tensor at its location. Raises: ClvrError unless it has the shape and dtype of the header."""
    if tensor.shape != stored.shape or tensor.dtype != stored.dtype:
        raise ClvrError(
            f"{stored.file}: {stored.key} is {stored.dtype} {stored.shape} in the header, "
            f"got {tensor.dtype} {tensor.shape}"
        )
    put(stored.file, stored.offset, tensor)


def write_tensors(
    directory: Path, tensors: Mapping[str, np.ndarray], name: str, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors that are in memory to the files that `preallocate_files` creates."""
    specs = [TensorSpec(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]
    for key, stored in preallocate_files(directory, specs, name, shard_bytes).items():
        write_tensor(stored, tensors[key])


def _preallocate_file(path: Path, shard: Sequence[TensorSpec]) -> list[StoredTensor]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    # Multiples of a page first: these can be written with direct I/O. Then wide types first, which keeps all aligned.
    for spec in sorted(shard, key=lambda spec: (spec.nbytes % PAGE > 0, -spec.dtype.itemsize)):
        header[spec.key] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        places.append((spec, end))
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    begin = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    with path.open("r+b" if path.exists() else "w+b") as file:
        if file.read(begin) != head:
            file.seek(0)
            file.truncate()
            file.write(head)
        file.truncate(begin + end)
    return [StoredTensor(spec.key, spec.shape, spec.dtype, path, begin + offset) for spec, offset in places]
