"""Names for full blocks of tokens: a block's hash covers its tokens and everything before them.

    seed("sql@3's key", "tenant") -> h0 = H(h, tokens 0..15) -> h1 = H(h0, tokens 16..31) -> ...

Equal hashes mean equal K/V: the seed holds the adapter's effect digest and the tenant's salt, and starts from a secret
drawn once a process. With 128 bits that nobody outside can predict, a collision is not a case to handle, so the tokens
are not compared again. One block of 16 tokens costs about a microsecond.
"""

from __future__ import annotations

import hashlib
import secrets

from server.engine.sequence import Int32Array, Sequence

_DIGEST_BYTES = 16
_SECRET = secrets.token_bytes(32)


def seed(key: str, cache_salt: str) -> bytes:
    """Start of the chain of all sequences of one adapter (or "base") and one tenant."""
    text = f"{len(key)}:{key}:{cache_salt}"  # the length keeps ("a", "b:c") and ("a:b", "c") apart
    return hashlib.blake2b(_SECRET + text.encode(), digest_size=_DIGEST_BYTES).digest()


def extend(hashes: list[bytes], start: bytes, tokens: Int32Array, num_blocks: int, block_size: int) -> None:
    """Append the hashes of blocks len(hashes) .. num_blocks-1 of `tokens` (int32 [>= num_blocks * block_size])."""
    first = len(hashes)
    if first >= num_blocks:
        return
    parent = hashes[-1] if hashes else start
    data = tokens[first * block_size : num_blocks * block_size].tobytes()
    width = block_size * tokens.itemsize
    for offset in range(0, len(data), width):
        parent = hashlib.blake2b(parent + data[offset : offset + width], digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)


def hashes_of(sequence: Sequence, tokens: Int32Array, num_blocks: int, block_size: int) -> list[bytes]:
    """The sequence's hashes, at least `num_blocks` of them; what is missing is computed and kept on it."""
    if len(sequence.block_hashes) < num_blocks:
        start = seed(sequence.key, sequence.request.cache_salt)
        extend(sequence.block_hashes, start, tokens, num_blocks, block_size)
    return sequence.block_hashes
