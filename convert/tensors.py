"""Tensors in diffusers/transformers folders: one safetensors file, or shards with an index.

Nothing here holds more than one tensor: reading maps a tensor's bytes when they are asked for, writing puts one tensor
after another at its place in the file.

Format: https://huggingface.co/docs/safetensors (8 bytes length, a JSON header, the tensors' bytes without gaps).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from clvr_jax.convert.disk import PAGE, put
from safetensors import SafetensorError, safe_open

from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json

DIFFUSERS_NAME = "diffusion_pytorch_model"
TRANSFORMERS_NAME = "model"
SHARD_BYTES = 5 * 2**30
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}

FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""What floating-point tensors may be converted to."""

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
    """A tensor to be: its key, shape and dtype."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a safetensors file: where its bytes begin."""

    file: Path
    offset: int

    def open(self) -> np.ndarray:
        """The tensor, read-only and mapped: no byte is read before it is used, none stays when the array is gone."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


Tensors = dict[str, StoredTensor]
"""The tensors of one model, key -> where it lies."""


def model_file(folder: Path, variant: str | None = None) -> Path:
    """The file that the model in `folder` is read from: its safetensors, or the index of its shards.

    Args:
      folder: of one model.
      variant: which of several sets of files, "fp16" say; a model without that variant is read from its plain files, as
        diffusers does.
    Raises: ClvrError if there is none.
    """
    plain = ("{name}.safetensors.index.json", "{name}.safetensors")
    forms = (f"{{name}}.safetensors.index.{variant}.json", f"{{name}}.{variant}.safetensors") if variant else ()
    names = (DIFFUSERS_NAME, TRANSFORMERS_NAME)
    candidates = (folder / form.format(name=name) for form in (*forms, *plain) for name in names)
    found = next((path for path in candidates if path.exists()), None)
    if found is not None:
        return found
    lacks = f"{folder}: neither {DIFFUSERS_NAME}.safetensors nor {TRANSFORMERS_NAME}.safetensors (or their index)"
    if others := sorted(path.name for path in folder.glob("*.safetensors*")):
        raise ClvrError(f"{lacks}, but {others[0]}; choose one as in NAME.fp16.safetensors with --variant fp16")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise ClvrError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is read; save the model as safetensors"
        )
    raise ClvrError(lacks)


def stored_tensors(folder: Path, variant: str | None = None) -> Tensors:
    """Where each tensor of the model in `folder` lies. Reads the headers only.

    Raises: ClvrError for missing, truncated or foreign files, a key that two shards hold, an index that is wrong or
      names shards that are absent.
    """
    file = model_file(folder, variant)
    if file.suffix != ".json":
        return {stored.key: stored for stored in read_header(file)}
    listed = read_json(file).get("weight_map", {})
    # A shard is a file of this directory: a name from a file is never a path.
    if not isinstance(listed, dict) or not all(isinstance(n, str) and is_file_name(n) for n in listed.values()):
        raise ClvrError(f"{file}: weight_map must be an object of tensors and names of files beside it")
    shards = [folder / shard for shard in sorted(set(listed.values()))]
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
        raise ClvrError(f"{file}: says that {wrong[0]} is where it is not ({len(wrong)} such keys)")
    return tensors


def without_tied_head(tensors: Tensors, embeddings: str, head: str = "lm_head.weight") -> Tensors:
    """Leaves out the head of a language model that some checkpoints hold beside the embeddings it is tied to.

    Raises: ClvrError if the two differ: then the model is not tied, whatever its config.json says.
    """
    if head not in tensors or embeddings not in tensors:
        return tensors
    ours, theirs = tensors[embeddings], tensors[head]
    step = max(1, ours.shape[0] // 64)  # maps a part at a time, so that little of them is resident
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
    """Whether a text from a file is the name of something in a directory, and no path out of it."""
    return (
        Path(name).name == name not in ("", ".", "..")
        and "\0" not in name
        and len(name.encode(errors="replace")) <= 255
    )


def bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: exact to compare, and fast to copy where NumPy does not know the type."""
    return values.view(f"u{values.dtype.itemsize}")


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises: ClvrError for a file that is missing, truncated or none of this kind.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ClvrError(f"{path}: not a file; fetch or convert it again")
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks that header and bytes fit together
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
    folder: Path, specs: Iterable[TensorSpec], name: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, StoredTensor]:
    """Makes `name`.safetensors, or shards of at most `shard_bytes` with an index, all headers and no bytes yet.

    Files that are there already, laid out in the same way, keep their bytes. `folder` should be a temporary one that is
    renamed when all tensors are written.
    Returns: the place of each tensor, for `write_tensor`.
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
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {
        stored.key: stored
        for file, shard in zip(files, shards, strict=True)
        for stored in _preallocate_file(folder / file, shard)
    }


def write_tensor(stored: StoredTensor, tensor: np.ndarray) -> None:
    """Puts a tensor at its place; its shape and dtype must be those laid out."""
    if tensor.shape != stored.shape or tensor.dtype != stored.dtype:
        raise ClvrError(
            f"{stored.file}: {stored.key} is laid out as {stored.dtype} {stored.shape}, "
            f"got {tensor.dtype} {tensor.shape}"
        )
    put(stored.file, stored.offset, tensor)


def write_tensors(folder: Path, tensors: Mapping[str, np.ndarray], name: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors that are in memory; see `preallocate_files`."""
    specs = [TensorSpec(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]
    for key, stored in preallocate_files(folder, specs, name, shard_bytes).items():
        write_tensor(stored, tensors[key])


def _preallocate_file(path: Path, shard: Sequence[TensorSpec]) -> list[StoredTensor]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = [], 0
    # Whole pages first: each of them can be written directly. Then wide types first, which keeps all of them aligned.
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
