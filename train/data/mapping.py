"""Several chunk files as one array: mapped side by side into one range of addresses, nothing copied.

One `torch.index_select` then gathers a batch from the whole pool at memory speed. Copying the files together
first would cost as much as training on them; gathering file by file costs a call per file and batch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from pathlib import Path

import numpy as np

MAP_FIXED = 0x10  # Linux and macOS alike; the mmap module does not export it
MADV_POPULATE_READ = 22  # Linux ≥ 5.14: bring all pages in, without a fault for each
FAILED = ctypes.c_void_p(-1).value


def can_map(chunk_bytes: int) -> bool:
    """Whether files of this size can lie side by side: whole pages, on a system that maps at a given address."""
    return sys.platform in ("linux", "darwin") and chunk_bytes % mmap.PAGESIZE == 0


def map_side_by_side(paths: list[Path], chunk_bytes: int) -> np.ndarray:
    """The files' bytes, one after another: uint8 [len(paths) * chunk_bytes], read-only by the kernel's word.

    The mapping ends when the array and everything that views it is gone.

    Raises:
        OSError: the system refuses.
    """
    libc = _libc()
    total = chunk_bytes * len(paths)
    base = libc.mmap(None, total, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == FAILED:
        raise OSError(ctypes.get_errno(), "cannot reserve addresses for a pool")
    try:
        for number, path in enumerate(paths):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                if hasattr(os, "posix_fadvise"):
                    # all of the pool is asked of the disk at once: page faults alone read in small pieces
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                address = base + number * chunk_bytes
                flags = mmap.MAP_SHARED | MAP_FIXED
                if libc.mmap(address, chunk_bytes, mmap.PROT_READ, flags, descriptor, 0) == FAILED:
                    raise OSError(ctypes.get_errno(), f"cannot map {path}")
            finally:
                os.close(descriptor)
    except OSError:
        libc.munmap(base, total)
        raise
    memory = (ctypes.c_uint8 * total).from_address(base)
    weakref.finalize(memory, libc.munmap, base, total)
    view: np.ndarray = np.ctypeslib.as_array(memory)
    return view


def bring_in(memory: np.ndarray) -> None:
    """Read all of a mapping into the page cache and this process's page table; waits for the disk."""
    if sys.platform != "linux" or _libc().madvise(memory.ctypes.data, memory.nbytes, MADV_POPULATE_READ) != 0:
        memory[:: mmap.PAGESIZE].max(initial=0)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
