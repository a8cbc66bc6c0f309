"""Bytes arrive at their places, whichever way they take to the disk."""

import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from clvr_jax.checkpoint_io.disk import PAGE, empty, put
from clvr_jax.checkpoint_io.tensors import FLOATS, TensorSpec, preallocate_files

MEMORY = Path("/dev/shm")  # a file system without a disk


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access(MEMORY, os.W_OK):
        pytest.skip("no file system in memory here")
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        yield Path(place)


def test_memory_begins_with_a_page_and_has_the_shape_that_was_asked_for():
    for shape in ((3, 5), (0, 4), ()):
        values = empty(shape, np.dtype(np.float32))
        assert (values.shape, values.dtype, values.ctypes.data % PAGE) == (shape, np.float32, 0)
        values[...] = 1  # may be written


@pytest.mark.parametrize(
    ("offset", "size", "shift"),
    [(0, 1 << 21, 0), (3 * PAGE, 1 << 20, 0), (8, 1 << 20, 0), (0, (1 << 20) + 2, 0), (0, 1 << 20, 16), (24, 6, 2)],
    ids=["pages", "pages later", "between pages", "odd length", "odd address", "few bytes"],
)
def test_only_the_bytes_of_the_block_change(folder, offset, size, shift):
    before = np.full((1 << 22,), 7, np.uint8)
    file = folder / "file"
    file.write_bytes(before.tobytes())
    memory = empty((size + shift,), np.dtype(np.uint8))
    memory[:] = np.random.default_rng(0).integers(0, 256, memory.size, np.uint8)
    put(file, offset, memory[shift:])
    before[offset : offset + size] = memory[shift:]
    assert file.read_bytes() == before.tobytes()


def test_a_file_is_made_and_columns_are_put_in_order(folder):
    values = np.arange(1 << 20, dtype=np.uint16).reshape(1 << 10, 1 << 10)
    put(folder / "new", 0, values.T)
    assert (folder / "new").read_bytes() == values.T.tobytes()


def test_tensors_of_whole_pages_begin_with_a_page_and_all_at_a_multiple_of_their_width(tmp_path):
    sizes = {"a": (3,), "b": (64, 64), "c": (5, 7), "d": (2, 4096), "e": (1,)}
    types = {"a": "bfloat16", "b": "bfloat16", "c": "float32", "d": "float16", "e": "float32"}
    specs = [TensorSpec(key, shape, FLOATS[types[key]]) for key, shape in sizes.items()]
    places = preallocate_files(tmp_path, specs, "model")
    assert [places[key].offset % PAGE for key in ("b", "d")] == [0, 0]
    assert all(place.offset % place.dtype.itemsize == 0 for place in places.values())
    spans = sorted((place.offset, place.offset + place.nbytes) for place in places.values())
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans))  # the format has no gaps
