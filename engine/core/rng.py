"""Random numbers that belong to rows, not to processes.

Every draw is a function of a study's seed and of names (an image's id, a purpose, a step). Batch
size, number of workers, order, a kill and a resume therefore change no draw.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed: the truncated SHA-256 of `parts`, whose types count (1 is not "1")."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """Return numpy's PCG64 generator for these names."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))
