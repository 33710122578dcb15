"""Compressors of what clients and server send: maps of a flat vector, with the size of their encoding in bits.

`compressor("top_k:5%", task.shapes, task.x.dtype)` makes one. Both sides of a channel know the layers' shapes and type,
the compressor, and the run's keys; nothing else is free.
"""

from vfl.compressors.base import Compressed, Compressor
from vfl.compressors.spec import COMPRESSORS, compressor

__all__ = ["COMPRESSORS", "Compressed", "Compressor", "compressor"]
