"""Writing of blocks at offsets in files, with direct I/O where that is possible.

Written tensors are not read again soon, and gigabytes of fresh pages in the page cache cost more than the rest of a
conversion: on a virtual machine twice the time of the disk. So whole pages are written with direct I/O. All other
blocks go through the page cache: parts of a page, blocks on file systems without direct I/O, and blocks that would have
to wait while the disk is busy.
"""

import errno
import math
import mmap
import os
import threading
from pathlib import Path

import numpy as np

PAGE = 4096
"""Alignment of addresses, offsets and lengths for direct I/O, in bytes: no disk in use has larger blocks."""

_DIRECT = getattr(os, "O_DIRECT", 0)  # not every system has it
_LEAST = 1 << 20  # smaller blocks are not worth a wait for the disk
_CACHED = 1 << 16  # bytes per write through the cache: for more, Linux searches slowly for long runs of free pages
_DISK = threading.Semaphore(2)  # more concurrent writes do not make the disk of a virtual machine faster


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized, page-aligned array, which `put` can write with direct I/O."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # transposing a matrix touches one page per row
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)


def put(file: Path, offset: int, values: np.ndarray) -> None:
    """Writes an array's bytes at an offset of a file, which is created if it does not exist.

    Raises: OSError if the file cannot be written.
    """
    block = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    whole = offset % PAGE == block.ctypes.data % PAGE == block.size % PAGE == 0
    if _DIRECT and whole and block.size >= _LEAST and _DISK.acquire(blocking=False):
        try:
            return _write(file, offset, block, _DIRECT, block.size)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system does not support direct I/O
                raise
        finally:
            _DISK.release()
    _write(file, offset, block, 0, _CACHED)


def _write(file: Path, offset: int, block: np.ndarray, flags: int, most: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    try:
        done = 0
        while done < block.size:  # one call may write only a part
            done += os.pwrite(descriptor, block[done : done + most].data, offset + done)
    finally:
        os.close(descriptor)
