"""The streaming merge of directories of any size: three are read and one is written, one tensor at a time.

The arithmetic is the same as for trees (deltas.py), in float32, on blocks of a tensor. While one tensor is merged, the
next one is read for its sha256, which brings it into the page cache. The new directory appears when it is complete, and
an interrupted run can be resumed (`checkpoint_io.journal`).

A NaN or infinity in any input is an error: it would propagate to the result and to every generated image.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from clvr_jax.checkpoint_io.blocks import Buffers
from clvr_jax.checkpoint_io.journal import resumable, states
from clvr_jax.checkpoint_io.tensors import bits
from clvr_jax.convert.lora.config import PEFT_CONFIG, initial_adapters
from clvr_jax.convert.streaming.conversion import copy_file, shape_in, writer
from clvr_jax.convert.streaming.planning import TensorSlice
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json, write_json
from clvr_jax.files.json_input import UncheckedJSON
from clvr_jax.files.output_paths import check_destination
from clvr_jax.merging.deltas import delta_of
from clvr_jax.merging.methods import magnitude_threshold, merge_block, random_key
from clvr_jax.merging.norms import DeltaStatistics, layer_of, total
from clvr_jax.merging.planning import MERGE, OLD_MERGE, Merge
from clvr_jax.merging.sources import LoRADelta, Weights, is_weight

MAX_RELATIVE_DISTANCE = 1.0
"""Largest |delta| / |base| of a layer that was tuned from this base; for two random layers it is 1.4."""

# Sizes of blocks: few, so that few programs are compiled; a block is padded to one of them. The largest fits the CPU's
# cache with its deltas in float32; for larger ones the system would clear fresh pages, which takes longer than the
# arithmetic.
_BLOCKS = (1 << 12, 1 << 16, 1 << 19)

_delta = jax.jit(delta_of)


def merge(
    plan: Merge,
    out: Path,
    *,
    resume: bool = False,
    on_tensor: Callable[[str], None] | None = None,
    finish: Callable[[Path, Mapping[str, DeltaStatistics]], None] | None = None,
) -> dict[str, DeltaStatistics]:
    """Executes a planned merge.

    Args:
      plan: from `plan_merge`.
      out: the new directory; must not exist.
      resume: continue an interrupted run of the same merge.
      on_tensor: called with its key after each tensor, including those of an earlier run.
      finish: called with the temporary directory and the result before the directory is renamed, to write other files.
    Returns: key -> statistics of each tensor that was merged.
    Raises: UsageError if `out` exists, or if there is an interrupted run and `resume` is not set; ClvrError if an input
      contains a NaN or was tuned from another base, or if a file cannot be read or written. Then no file remains; a run
      that is killed leaves its temporary directory.
    """
    check_destination(out, *(side.origin.path for side in plan.inputs))
    on_tensor = on_tensor or (lambda key: None)
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for key in plan.weights:
        layers[layer_of(key)].append(key)
    with (
        resumable(out, "merge", _identity(plan), plan.nbytes, resume) as (directory, journal),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        if not plan.force:
            _check_records(plan)
        buffers = Buffers()
        write, close = writer(plan.base.component, directory / plan.base.component.name, plan.base.component.source)
        for key in journal.done:
            on_tensor(key)
        sums = {key: DeltaStatistics(*values) for key, values in journal.done.items() if values}
        wanted = [tensor_slice for tensor_slice in plan.slices if tensor_slice.spec.key not in journal.done]
        for tensor_slice in _read_ahead(plan, wanted):
            key = tensor_slice.spec.key
            values, own = _merged(plan, tensor_slice, buffers)
            if own is not None:
                sums[key] = own
                _check_distance(plan, layer_of(key), [sums.get(member) for member in layers[layer_of(key)]])
            write(tensor_slice, values)
            journal.add(key, own and own.values)
            on_tensor(key)
        close()
        for name, path in plan.copied.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, directory / name)
        for name, content in plan.changed.items():
            write_json(directory / name, content)
        if finish:
            finish(directory, sums)
    return sums


def _merged(plan: Merge, tensor_slice: TensorSlice, buffers: Buffers) -> tuple[np.ndarray, DeltaStatistics | None]:
    """Returns a tensor of the result in the base's format and dtype, and its statistics.

    A counter is that of the base, and its statistics are None.
    """
    key, settings = tensor_slice.spec.key, plan.settings
    base = plan.base.values(key, buffers)
    if not is_weight(tensor_slice):
        return base.astype(tensor_slice.spec.dtype, copy=False), None
    low_rank = isinstance(plan.align, LoRADelta)
    operands = [base.reshape(-1), plan.distill.values(key, buffers).reshape(-1), _align(plan, key, buffers, base)]
    least = _magnitude_thresholds(operands, low_rank, settings.density, buffers) if settings.method == "ties" else None
    merged = buffers("merged", shape_in(tensor_slice, plan.base.component.source), tensor_slice.spec.dtype)
    flat, sums = merged.reshape(-1), np.zeros(4)
    for number, (part, blocks) in enumerate(_blocks(operands)):
        extra = random_key(settings.seed, key, number) if settings.method == "dare" else least
        block, own = merge_block(
            *blocks, plan.weights[key], extra, method=settings.method, density=settings.density, low_rank=low_rank
        )
        bits(flat)[part] = bits(np.asarray(block))[: flat[part].size]
        sums += np.asarray(own, np.float64)
    if not np.isfinite(sums).all():
        raise ClvrError(_not_finite(plan, key, operands))
    if merged.dtype == np.float16 and not np.isfinite(merged).all():
        raise ClvrError(f"{key}: the result does not fit float16; convert the base to bfloat16 first")
    return merged, DeltaStatistics(*map(float, sums))


def _align(plan: Merge, key: str, buffers: Buffers, base: np.ndarray) -> np.ndarray:
    if isinstance(plan.align, Weights):
        return plan.align.values(key, buffers).reshape(-1)
    delta = plan.align.delta(key, base)
    return np.broadcast_to(np.float32(0), (base.size,)) if delta is None else delta.reshape(-1)


def _blocks(operands: list[np.ndarray]) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yields the range of each block of some vectors of one length, and the vectors' blocks, padded with zeros."""
    size = operands[0].size
    for begin in range(0, size, _BLOCKS[-1]):
        part = slice(begin, min(begin + _BLOCKS[-1], size))
        length = next(length for length in _BLOCKS if part.stop - begin <= length)
        yield part, [_padded(values[part], length) for values in operands]


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    if values.size == length:
        return values
    padded = np.zeros(length, values.dtype)
    bits(padded)[: values.size] = bits(values)
    return padded


def _magnitude_thresholds(
    operands: list[np.ndarray], low_rank: bool, density: float | None, buffers: Buffers
) -> tuple[float, float]:
    """Returns the smallest magnitudes that TIES keeps of the two deltas of a tensor."""
    assert density is not None
    base, *tuned = operands
    least = []
    for values in tuned:
        magnitudes = buffers("magnitudes", (base.size,), np.dtype(np.float32))
        for part, (of_base, of_tuned) in _blocks([base, values]):
            delta = of_tuned if low_rank and values is operands[-1] else np.asarray(_delta(of_tuned, of_base))
            np.abs(delta[: magnitudes[part].size], out=magnitudes[part])
        least.append(magnitude_threshold(magnitudes, density))
    return least[0], least[1]


def _read_ahead(plan: Merge, slices: list[TensorSlice]) -> Iterator[TensorSlice]:
    """Yields each slice once the digests have read its bytes, while a thread reads those of the next slice."""
    files = [side.stored for side in plan.inputs if isinstance(side, Weights)]
    digests = [side.digests for side in plan.inputs if isinstance(side, Weights)]
    with ThreadPoolExecutor(len(files)) as pool:

        def follow(tensor_slice: TensorSlice | None) -> list[Future[None]]:
            found = zip(
                digests, (stored.get(tensor_slice.spec.key) if tensor_slice else None for stored in files), strict=True
            )
            return [pool.submit(digest.follow, tensor) for digest, tensor in found if tensor]

        ahead = follow(slices[0] if slices else None)
        for tensor_slice, following in itertools.zip_longest(slices, slices[1:]):
            for future in ahead:
                future.result()
            ahead = follow(following)
            yield tensor_slice


def _not_finite(plan: Merge, key: str, operands: list[np.ndarray]) -> str:
    sides = zip(plan.inputs, operands, strict=True)
    bad = [side.role for side, values in sides if not np.isfinite(values.astype(np.float32)).all()]
    if not bad:
        return f"{key}: its values are so large that the sum of their squares overflows float32; the files are damaged"
    return f"{' and '.join(bad)}: {key} contains NaN or infinity, which would spoil every image; use another checkpoint"


def _check_distance(plan: Merge, layer: str, sums: list[DeltaStatistics | None]) -> None:
    """Raises ClvrError if a complete layer is too far from the base to be tuned from it."""
    own = [found for found in sums if found is not None]
    if plan.force or len(own) < len(sums):
        return
    for side, relative in total(own).relative.items():
        if relative is not None and relative > MAX_RELATIVE_DISTANCE:
            raise ClvrError(
                f"{side}: the delta of {layer} is {relative:.2f} of the base's norm (at most "
                f"{MAX_RELATIVE_DISTANCE:g} for a tuned model), so it was made from another base; --force merges anyway"
            )


def _check_records(plan: Merge) -> None:
    """Raises ClvrError if the merge.json of an input names another base."""
    for side in (plan.distill, plan.align):
        name, content = _read_record(side)
        inputs = content.get("inputs")
        of_base = inputs.get("base") if isinstance(inputs, dict) else None
        if not isinstance(of_base, dict) or not isinstance(of_base.get("files"), dict):
            continue
        # As texts, because a foreign file may hold values of any type.
        if sorted(map(str, of_base["files"].values())) != sorted(plan.base.digests.finish().values()):
            raise ClvrError(
                f"{side.role}: {name} in {side.origin.name} names another base, "
                f"{of_base.get('source')!s:.200}, with another sha256; --force merges anyway"
            )


def _read_record(side: Weights | LoRADelta) -> tuple[str, UncheckedJSON]:
    """Returns name and content of the merge.json of an input, or of the recipe.json of earlier versions."""
    directories = (side.origin.path, side.directory) if isinstance(side, Weights) else (side.file.parent,)
    paths = (directory / name for directory in directories for name in (MERGE, OLD_MERGE))
    found = next((path for path in paths if path.exists()), None)
    return (found.name, read_json(found)) if found else ("", {})


def _identity(plan: Merge) -> str:
    """Returns what must be equal to resume an interrupted run."""
    files = {path for side in plan.inputs for path in _files(side)} | set(plan.copied.values())
    return json.dumps([repr(plan.settings), plan.force, plan.base.component.name, states(files)])


def _files(side: Weights | LoRADelta) -> set[Path]:
    if isinstance(side, LoRADelta):
        beside = side.file.with_name(PEFT_CONFIG)
        return {side.file, *([beside] if beside.exists() else []), *initial_adapters(side.file)}
    return set(side.component.files)
