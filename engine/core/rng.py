"""Random numbers that belong to rows, not to processes.

Every draw is a function of a study's seed and of names (an image's id, a purpose, a step).
Therefore no draw depends on batch size, number of workers, order, kills or resumes.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed: the truncated SHA-256 of `parts`. Types count: 1 and "1" differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator (PCG64) seeded by `derive_seed`."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))
