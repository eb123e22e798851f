"""Attention of one packed step over K/V that lives in blocks.

Registered with transformers under `NAME`; the step's metadata comes as the keyword argument
`paged`. Sequences that compute one token (decode) are gathered in buckets of similar length,
each one batched attention; a sequence that computes more attends on its own. The length that a
sequence is padded to depends on itself alone, so a row's bits do not depend on its neighbours,
and one very long neighbour costs the short ones nothing.

Rows of a K/V prefix compute like any other, but their K and V are replaced by the adapter's before anything
reads them.

Semantics, for the token at position p of a sequence, over its keys j:
    softmax(cap(scaling * q . k_j) [, sink])  over  max(0, p - window + 1) <= j <= p, and over j < pinned <= p

`pinned` tokens stay in sight of every window: a prefix behind which the prompt begins at position 0 was trained so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from peft_core.forms import KVPrefix
from server.engine.kv_cache import KVCache

NAME = "veneer_paged"

# Arguments that models pass and that are honoured, or that cannot change a result here. Anything else
# that is not None is an error: a model asks for something that this function does not know.
IRRELEVANT = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
              "return_dict", "cache", "past_key_values", "cache_position"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Sequences of one token each, padded to the same number of blocks.

    Their K/V are `blocks` of the cache's block table, layer 0's K; unused places repeat the first block.
    """

    rows: torch.Tensor  # [n] int64, rows of the step
    blocks: torch.Tensor  # [n * num_blocks] int64
    lengths: torch.Tensor  # [n] int64, tokens to attend to, the row's own included
    padded_length: int  # tokens
    pinned: torch.Tensor | None = None  # [n] int64, leading tokens that no window hides; None: none


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence that computes rows [first_row, first_row + num_rows) at positions from `start`."""

    first_row: int
    num_rows: int
    start: int
    blocks: torch.Tensor  # [blocks] int64, as in DecodeBucket; empty when start is 0
    pinned: int = 0  # as in DecodeBucket


@dataclass(frozen=True, slots=True)
class PrefixRows:
    """Rows from `first_row` are tokens [start, end) of a prefix."""

    first_row: int
    start: int
    end: int
    prefix: KVPrefix


@dataclass(slots=True)
class PagedStep:
    """All that attention needs to know of one step; made once, read by every layer."""

    cache: KVCache
    write_rows: torch.Tensor  # [rows] int64, where layer 0's K goes in the cache's row table
    decode: tuple[DecodeBucket, ...]
    chunks: tuple[Chunk, ...]
    layer_calls: list[int]  # how often each layer attended; the self-check reads it
    prefixes: tuple[PrefixRows, ...] = ()
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)


class UnknownAttentionArgument(RuntimeError):
    """The base model asks its attention for something that paged attention does not do."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    paged: PagedStep | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, rows, head_dim]; key, value [1, kv_heads, rows, head_dim]; returns [1, rows, heads, head_dim].

    Writes the step's K and V into the cache.
    """
    _refuse_unknown(paged, attention_mask, dropout, is_causal, others)
    assert paged is not None
    layer: int = module.layer_idx  # type: ignore[assignment]
    paged.layer_calls[layer] += 1
    call = _Call(paged, layer, query[0].transpose(0, 1), scaling, sliding_window, softcap, s_aux)
    if paged.prefixes:
        key, value = _with_prefixes(paged.prefixes, layer, key, value)
    call.write(key[0].transpose(0, 1), value[0].transpose(0, 1))
    out = torch.empty_like(call.query, memory_format=torch.contiguous_format)  # [rows, heads, head_dim]
    for index, bucket in enumerate(paged.decode):
        call.decode(index, bucket, out)
    for index, chunk in enumerate(paged.chunks):
        call.prefill(index, chunk, key[0], value[0], out)
    return out[None], None


def _refuse_unknown(
    paged: PagedStep | None, attention_mask: Any, dropout: float, is_causal: bool | None, others: dict[str, Any]
) -> None:
    unknown = sorted(name for name, given in others.items() if given is not None and name not in IRRELEVANT)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if dropout:
        unknown.append("dropout")
    if is_causal is False:
        unknown.append("is_causal=False")
    if unknown:
        raise UnknownAttentionArgument(
            f"the model passes {', '.join(unknown)} to its attention, which paged attention does not know. Ignoring it "
            "would give wrong answers without an error, so this model is not served."
        )
    if paged is None:
        raise UnknownAttentionArgument("paged attention was called outside of a step; use another implementation.")


def _with_prefixes(
    prefixes: tuple[PrefixRows, ...], layer: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of key and value, [1, kv_heads, rows, head_dim], with the prefixes' in the rows that are theirs."""
    key, value = key.clone(), value.clone()
    for part in prefixes:
        rows = slice(part.first_row, part.first_row + part.end - part.start)
        key[0, :, rows] = part.prefix.keys[layer, part.start : part.end].transpose(0, 1).to(key.dtype)
        value[0, :, rows] = part.prefix.values[layer, part.start : part.end].transpose(0, 1).to(value.dtype)
    return key, value


@dataclass(frozen=True, slots=True)
class _Call:
    """One layer's attention in one step."""

    paged: PagedStep
    layer: int
    query: torch.Tensor  # [rows, heads, head_dim]
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value: [rows, kv_heads, head_dim]."""
        cache, block_size = self.paged.cache, self.paged.cache.shape.block_size
        rows = self.paged.write_rows + 2 * self.layer * block_size
        cache.rows.index_copy_(0, rows, key.flatten(1))
        cache.rows.index_copy_(0, rows + block_size, value.flatten(1))

    def read(self, blocks: torch.Tensor, num_sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of whole blocks: [n, kv_heads, tokens, head_dim] views."""
        shape, table = self.paged.cache.shape, self.paged.cache.blocks
        keys, values = (
            table.index_select(0, blocks + 2 * self.layer + which)
            .view(num_sequences, -1, shape.num_kv_heads, shape.head_dim)
            .transpose(1, 2)
            for which in (0, 1)
        )
        return keys, values

    def decode(self, index: int, bucket: DecodeBucket, out: torch.Tensor) -> None:
        n, kv_heads = len(bucket.rows), self.paged.cache.shape.num_kv_heads
        keys, values = self.read(bucket.blocks, n)
        heads = self.query.index_select(0, bucket.rows).view(n, kv_heads, -1, self.query.shape[-1])
        result = self.attend(heads, keys, values, self._decode_mask(index, bucket), self._sinks(1, kv_heads, -1, 1))
        out.index_copy_(0, bucket.rows, result.reshape(n, *out.shape[1:]))

    def prefill(self, index: int, chunk: Chunk, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        """key, value: [kv_heads, rows, head_dim] of this step."""
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
        length = chunk.start + chunk.num_rows
        if chunk.start:
            keys, values = (part[0, :, :length] for part in self.read(chunk.blocks, 1))
        else:
            keys, values = key[:, rows], value[:, rows]
        kv_heads, head_dim = keys.shape[0], keys.shape[-1]
        queries = self.query[rows].view(chunk.num_rows, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        shared = (kv_heads, queries.shape[1], length, head_dim)
        mask = self._chunk_mask(index, chunk)
        sinks = self._sinks(kv_heads, -1, 1, 1)
        result = self.attend(queries, keys[:, None].expand(shared), values[:, None].expand(shared), mask, sinks)
        out[rows] = result.permute(2, 0, 1, 3).reshape(chunk.num_rows, -1, head_dim)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """q [a, b, queries, head_dim]; k, v [a, b, tokens, head_dim]; mask is additive, None is plainly causal."""
        if self.softcap is None and sinks is None:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling)
        scale = q.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = q @ k.transpose(-1, -2) * scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None:
            mask = torch.full_like(scores[0, 0], -torch.inf).triu(1)
        scores = scores + mask
        if sinks is None:
            return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v
        logits = torch.cat([scores, sinks.expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
        return torch.softmax(logits, -1, dtype=torch.float32)[..., :-1].to(v.dtype) @ v

    def _sinks(self, *shape: int) -> torch.Tensor | None:
        """The learnt logit of each head, in the layout of the scores; it takes part in the softmax, without a value."""
        return None if self.sinks is None else self.sinks.view(shape)

    def _decode_mask(self, index: int, bucket: DecodeBucket) -> torch.Tensor:
        """[n, 1, 1, tokens] additive."""
        key = (index, self.window)
        if key not in self.paged.masks:
            positions = torch.arange(bucket.padded_length, device=self.query.device)
            hidden = positions >= bucket.lengths[:, None]
            if self.window is not None:
                left = positions < (bucket.lengths - self.window)[:, None]
                hidden |= left if bucket.pinned is None else left & (positions >= bucket.pinned[:, None])
            self.paged.masks[key] = _additive(hidden, self.query)[:, None, None]
        mask = self.paged.masks[key]
        assert mask is not None
        return mask

    def _chunk_mask(self, index: int, chunk: Chunk) -> torch.Tensor | None:
        """[rows, tokens] additive; None is plainly causal."""
        key = (-1 - index, self.window)
        if key not in self.paged.masks:
            self.paged.masks[key] = _causal_mask(chunk, self.window, self.query)
        return self.paged.masks[key]


def _causal_mask(chunk: Chunk, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    length = chunk.start + chunk.num_rows
    if not chunk.start and (window is None or length <= window):
        return None
    own = torch.arange(chunk.start, length, device=like.device)[:, None]
    others = torch.arange(length, device=like.device)
    hidden = others > own
    if window is not None:
        hidden |= (others <= own - window) & (others >= chunk.pinned)
    return _additive(hidden, like)


def _additive(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


AttentionInterface.register(NAME, paged_attention)
