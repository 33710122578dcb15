"""Memory of the CPU's that a chunk has freed stays with the process, for the next one."""

from __future__ import annotations

import ctypes
import functools
import sys

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # names of glibc's <malloc.h>


@functools.cache
def keep_freed_memory() -> None:
    """Tells glibc's allocator not to give freed memory back to the system; elsewhere, nothing.

    It would give back every block above 32 MB at once, and the next one would come in pages that the system first fills
    with zeros, which takes longer than most layers compute: under vmap, where a layer's outputs are those of all
    clients, it took two fifths of the time of the CNN of McMahan et al.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
