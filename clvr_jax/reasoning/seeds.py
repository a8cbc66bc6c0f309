"""Seeds that depend on what they are for, not on the order of calls."""

import hashlib


def derive_seed(seed: int, *path: int | str) -> int:
    """Returns a 31-bit seed that depends on `seed` and the path only; it is the same on every machine."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
