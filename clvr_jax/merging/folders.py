"""A merge over directories of any size: three directories are read and one is written, one tensor at a time.

The arithmetic is that of trees (deltas.py), in float32 and by the same expressions, on blocks of a tensor. While one is
merged, the next one is read for its sha256, which brings it into memory. The new directory appears when it is complete,
and a run that was killed goes on (convert/journal.py).

A value that is not finite in any of the inputs ends the merge: it would be in the result, and in every picture.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clvr_jax.convert.conversion import Buffers, copy_file, shape_in, writer
from clvr_jax.convert.journal import resumable, states
from clvr_jax.convert.lora_config import PEFT_CONFIG
from clvr_jax.convert.planning import TensorSlice
from clvr_jax.convert.tensors import bits
from clvr_jax.errors import ClvrError
from clvr_jax.files import read_json
from clvr_jax.merging.deltas import change_of
from clvr_jax.merging.methods import least_kept, merge_block, random_key
from clvr_jax.merging.norms import Sums, layer_of, total
from clvr_jax.merging.planning import RECIPE, Merge
from clvr_jax.merging.sources import LowRank, Weights, is_weight
from clvr_jax.outputs import check_destination

FARTHEST = 1.0
"""A layer that was moved by more than its own length was hardly tuned from this base; two random ones are 1.4 apart."""

# Few sizes, so that few programs are compiled; a block is padded to one of them. The largest stays in the cache with
# its changes in float32; for larger ones the system clears fresh pages, longer than the arithmetic takes.
_BLOCKS = (1 << 12, 1 << 16, 1 << 19)

_change = jax.jit(change_of)


def merge(
    plan: Merge,
    out: Path,
    *,
    resume: bool = False,
    on_tensor: Callable[[str], None] | None = None,
    finish: Callable[[Path, Mapping[str, Sums]], None] | None = None,
) -> dict[str, Sums]:
    """Does what was planned.

    Args:
      plan: from `plan_merge`.
      out: the new directory; must not exist.
      resume: go on with a run of the same merge that was killed.
      on_tensor: called with its key after each tensor, those of an earlier run included.
      finish: called with the directory before it gets its name, and with the result, to write what else belongs there.
    Returns: key -> sums of each tensor that was merged; `norms` says what can be made of them.
    Raises: UsageError if `out` exists or a killed run is there and `resume` is not set; ClvrError if an input holds
      NaN or was tuned from another base, or if something cannot be written. Then nothing is left behind; a run that is
      killed leaves its temporary directory.
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
            _check_recipes(plan)
        buffers = Buffers()
        write, close = writer(plan.base.component, directory / plan.base.component.name, plan.base.component.source)
        for key in journal.done:
            on_tensor(key)
        sums = {key: Sums(*values) for key, values in journal.done.items() if values}
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
        if finish:
            finish(directory, sums)
    return sums


def _merged(plan: Merge, tensor_slice: TensorSlice, buffers: Buffers) -> tuple[np.ndarray, Sums | None]:
    """A tensor of the result in the base's layout and dtype, and its sums; a counter is the base's, and has none."""
    key, settings = tensor_slice.spec.key, plan.settings
    base = plan.base.values(key, buffers)
    if not is_weight(tensor_slice):
        return base.astype(tensor_slice.spec.dtype, copy=False), None
    low_rank = isinstance(plan.align, LowRank)
    operands = [base.reshape(-1), plan.distill.values(key, buffers).reshape(-1), _align(plan, key, buffers, base.size)]
    least = _least_kept(operands, low_rank, settings.density, buffers) if settings.method == "ties" else None
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
    return merged, Sums(*map(float, sums))


def _align(plan: Merge, key: str, buffers: Buffers, size: int) -> np.ndarray:
    if isinstance(plan.align, Weights):
        return plan.align.values(key, buffers).reshape(-1)
    change = plan.align.change(key)
    return np.broadcast_to(np.float32(0), (size,)) if change is None else change.reshape(-1)


def _blocks(operands: list[np.ndarray]) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """The place of each block of some vectors of one length, and the block of each, filled up with zeros."""
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


def _least_kept(
    operands: list[np.ndarray], low_rank: bool, density: float | None, buffers: Buffers
) -> tuple[float, float]:
    """The smallest magnitudes that TIES keeps of the changes of a whole tensor."""
    assert density is not None
    base, *tuned = operands
    least = []
    for values in tuned:
        magnitudes = buffers("magnitudes", (base.size,), np.dtype(np.float32))
        for part, (of_base, of_tuned) in _blocks([base, values]):
            change = of_tuned if low_rank and values is operands[-1] else np.asarray(_change(of_tuned, of_base))
            np.abs(change[: magnitudes[part].size], out=magnitudes[part])
        least.append(least_kept(magnitudes, density))
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
        return f"{key}: its numbers are too large for float32 to add their squares; the files are damaged"
    return f"{' and '.join(bad)}: {key} holds NaN or infinity, which would be in every picture; take another checkpoint"


def _check_distance(plan: Merge, layer: str, sums: list[Sums | None]) -> None:
    """Once a layer is complete: was it tuned from this base?"""
    own = [found for found in sums if found is not None]
    if plan.force or len(own) < len(sums):
        return
    for side, relative in total(own).relative.items():
        if relative is not None and relative > FARTHEST:
            raise ClvrError(
                f"{side}: {layer} is {relative:.2f} of the base's norm away from it (at most {FARTHEST:g} is a tuned "
                "model's), so it was made from another base; --force merges all the same"
            )


def _check_recipes(plan: Merge) -> None:
    """Where an input says what its base was, it must have been this one."""
    for side in (plan.distill, plan.align):
        inputs = _read_recipe(side).get("inputs")
        of_base = inputs.get("base") if isinstance(inputs, dict) else None
        if not isinstance(of_base, dict) or not isinstance(of_base.get("files"), dict):
            continue
        if sorted(of_base["files"].values()) != sorted(plan.base.digests.finish().values()):
            raise ClvrError(
                f"{side.role}: {RECIPE} in {side.origin.name} says that it was made from another base, "
                f"{of_base.get('source')}, of another sha256; --force merges all the same"
            )


def _read_recipe(side: Weights | LowRank) -> dict[str, Any]:
    places = (side.origin.path, side.directory) if isinstance(side, Weights) else (side.file.parent,)
    found = next((place / RECIPE for place in places if (place / RECIPE).exists()), None)
    return read_json(found) if found else {}


def _identity(plan: Merge) -> str:
    """What must be the same for a killed run to go on."""
    files = {path for side in plan.inputs for path in _files(side)} | set(plan.copied.values())
    return json.dumps([repr(plan.settings), plan.force, plan.base.component.name, states(files)])


def _files(side: Weights | LowRank) -> set[Path]:
    if isinstance(side, LowRank):
        beside = side.file.with_name(PEFT_CONFIG)
        return {side.file, *([beside] if beside.exists() else [])}
    return set(side.component.files)
