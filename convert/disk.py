"""Blocks of bytes at their places in files, past the system's page cache where they allow it.

What is written is not read again soon, and gigabytes of fresh pages for it cost more than all else in a conversion: on
a virtual machine twice the time of the disk. So whole pages go to the disk directly. The rest goes the usual way, and
so does whatever the file system does not take so, and what would have to wait while the disk is busy.
"""

import errno
import math
import mmap
import os
import threading
from pathlib import Path

import numpy as np

PAGE = 4096
"""What addresses, places and lengths must be multiples of: no disk in use has larger blocks."""

_DIRECT = getattr(os, "O_DIRECT", 0)  # not every system has it
_LEAST = 1 << 20  # less is not worth a wait for the disk
_CACHED = 1 << 16  # at once by way of the cache: for longer pieces Linux looks for longer runs of free pages, slowly
_DISK = threading.Semaphore(2)  # more writes at a time make no disk of a virtual machine faster


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array to be filled whose memory begins with a page, as `put` likes it."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a matrix that is turned over touches a page for each of its rows
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes).view(dtype).reshape(shape)


def put(file: Path, offset: int, values: np.ndarray) -> None:
    """Writes an array's bytes at a place of a file, which is made if it does not exist.

    Raises: OSError.
    """
    block = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    whole = offset % PAGE == block.ctypes.data % PAGE == block.size % PAGE == 0
    if _DIRECT and whole and block.size >= _LEAST and _DISK.acquire(blocking=False):
        try:
            return _write(file, offset, block, _DIRECT, block.size)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system cannot
                raise
        finally:
            _DISK.release()
    _write(file, offset, block, 0, _CACHED)


def _write(file: Path, offset: int, block: np.ndarray, flags: int, most: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    try:
        done = 0
        while done < block.size:  # one call may write less than all
            done += os.pwrite(descriptor, block[done : done + most].data, offset + done)
    finally:
        os.close(descriptor)
