"""How the C library handles freed memory: on the CPU, fetching it anew can cost more than computing what fills it."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's <malloc.h>: parameters of mallopt, and what they are set to. Larger blocks would have to be fetched anew.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1  # bytes, the most that mallopt takes
LARGEST = (2**30, 2**25)  # bytes; older versions take the second at most


def keep_freed_memory() -> bool:
    """Lets this process keep the memory it frees, for the next tensors; whether the C library does so from here on.

    By default, glibc gives back what lies at the end of its heap once that is twice the largest block that was freed:
    with two temporaries of a chunk's size, every operation pays for fresh pages. Where the environment sets any
    MALLOC_… variable or tunable, that is left as it is; so are other C libraries.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return any(mallopt(MMAP_THRESHOLD, size) == 1 for size in LARGEST) and mallopt(TRIM_THRESHOLD, KEPT) == 1
