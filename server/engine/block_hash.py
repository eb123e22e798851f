"""Names for full blocks of tokens: a block's hash covers its tokens and everything before them.

    seed("sql@3's key", "tenant") -> h0 = H(h, tokens 0..15) -> h1 = H(h0, tokens 16..31) -> ...

Blocks that lie wholly before the token from which an adapter acts are the base's, and bear the base's names.

Equal hashes mean equal K/V: the seed holds the adapter's effect digest and the tenant's salt, and starts from a secret
drawn once a process. With 128 bits that nobody outside can predict, a collision is not a case to handle, so the tokens
are not compared again. One block of 16 tokens costs about a microsecond.
"""

from __future__ import annotations

import hashlib
import secrets

from server.engine.sequence import BASE_KEY, Int32Array, Sequence

_DIGEST_BYTES = 16
_SECRET = secrets.token_bytes(32)


def seed(key: str, cache_salt: str) -> bytes:
    """Start of the chain of all sequences of one adapter (or "base") and one tenant."""
    text = f"{len(key)}:{key}:{cache_salt}"  # the length keeps ("a", "b:c") and ("a:b", "c") apart
    return hashlib.blake2b(_SECRET + text.encode(), digest_size=_DIGEST_BYTES).digest()


def extend(hashes: list[bytes], parent: bytes, tokens: Int32Array, num_blocks: int, block_size: int) -> None:
    """Append the hashes of blocks len(hashes) .. num_blocks-1 of `tokens` (int32 [>= num_blocks * block_size]).

    `parent` is what the first of them follows: the hash of the block before, or a seed.
    """
    first = len(hashes)
    data = tokens[first * block_size : num_blocks * block_size].tobytes()
    width = block_size * tokens.itemsize
    for offset in range(0, len(data), width):
        parent = hashlib.blake2b(parent + data[offset : offset + width], digest_size=_DIGEST_BYTES).digest()
        hashes.append(parent)


def hashes_of(sequence: Sequence, tokens: Int32Array, num_blocks: int, block_size: int) -> list[bytes]:
    """The sequence's hashes, at least `num_blocks` of them; what is missing is computed and kept on it."""
    hashes = sequence.block_hashes
    while len(hashes) < num_blocks:
        num_plain = 0 if sequence.adapter is None else sequence.layout.active_from // block_size
        end = min(num_plain, num_blocks) if len(hashes) < num_plain else num_blocks
        extend(hashes, _parent(sequence, num_plain), tokens, end, block_size)
    return hashes


def _parent(sequence: Sequence, num_plain: int) -> bytes:
    """What the next block follows; `num_plain` blocks are the base's."""
    hashes, salt = sequence.block_hashes, sequence.request.cache_salt
    if len(hashes) > num_plain:
        return hashes[-1]
    if sequence.adapter is None or len(hashes) < num_plain:
        return hashes[-1] if hashes else seed(BASE_KEY, salt)
    start, active_from = seed(sequence.key, salt), sequence.layout.active_from
    if not active_from:
        return start
    # The same tokens have other K/V where the adapter begins elsewhere among them, so the place belongs to the name.
    text = b"".join((start, active_from.to_bytes(4, "little"), *hashes[-1:]))
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()
