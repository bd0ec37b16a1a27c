"""Random numbers derived from (seed, purpose, ...): no global seed, and no two purposes share a stream."""

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose, e.g. `derive_seed(0, "bootstrap", step)`; the same on every platform."""
    # A separator that no purpose has: ("a", 12) and ("a1", 2) must differ. Python's `hash` differs between processes.
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1  # fits int64


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Make a NumPy generator for one purpose (see `derive_seed`)."""
    return np.random.default_rng(derive_seed(seed, *purpose))
