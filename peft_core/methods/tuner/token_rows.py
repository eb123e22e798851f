"""Rows of single tokens that an adapter replaces in the embedding, in the head, or in both.

    trainable_token_indices = [7, 9]                       rows 0 and 1 of the stored tensor are those of tokens 7 and 9
    trainable_token_indices = {"embed_tokens": [7, 9]}     the same, the table named

Despite its name, `trainable_tokens_delta` holds the new rows themselves. Where embedding and head are one weight, the
rows of the embedding are the head's as well, and are stored once; unless the config gives the head tokens of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.methods.tensors import Header, require_matrix
from peft_core.methods.tuner.vocabulary import Vocabulary
from peft_core.spec import BaseModelSpec

TokenIndices = Mapping[str | None, tuple[int, ...]]  # by the name of a table; None: the input embedding


class StoredRows(NamedTuple):
    """Rows of one table, by the name of the tensor that holds them."""

    path: str  # of the embedding or the head
    name: str
    token_ids: tuple[int, ...]


def match_rows(
    stored: Mapping[str, str], indices: TokenIndices, header: Header, spec: BaseModelSpec, *, field: str
) -> tuple[StoredRows, ...]:
    """Give every stored row its token, and tied heads the rows of their embedding.

    Args:
        stored: path -> tensor name.
        field: of the config, that lists the tokens.

    Raises:
        MalformedAdapter: the config lists tokens without rows, or their numbers differ.
        UnsupportedAdapter: there are rows without tokens, which PEFT would drop.
        BaseMismatch: the base has no such table, or one of another width.
    """
    vocabulary = Vocabulary.of(spec)
    rows = {path: _match(path, name, indices, header, spec, vocabulary, field) for path, name in stored.items()}
    twins = {path: vocabulary.twin(path) for path in rows}
    for entry, token_ids in indices.items():
        if not token_ids or any(_means(entry, path, vocabulary) for path in rows):
            continue
        if any(twin is not None and _means(entry, twin, vocabulary) for twin in twins.values()):
            continue  # the same tokens as of the embedding: stored once
        _refuse_missing(entry, token_ids, field)
    embedding = vocabulary.embedding.path if vocabulary.embedding is not None else None
    twin = twins.get(embedding) if embedding is not None else None
    if embedding in rows and twin is not None and twin not in rows:
        rows[twin] = rows[embedding]._replace(path=twin)
    for row in rows.values():
        _refuse_head_with_bias(row, spec)
    return tuple(rows.values())


def grown_tables(rows: tuple[StoredRows, ...], spec: BaseModelSpec) -> tuple[str, ...]:
    """The tables of a vocabulary that was made larger, where the rows of all new tokens are there and nothing else of
    it is: () unless both tables have them, the new tokens follow the base's own, and none is missing."""
    vocabulary = Vocabulary.of(spec)
    tables = [site.path for site in (vocabulary.embedding, vocabulary.head) if site is not None]
    for path in tables:
        size = vocabulary.size(path) or 0
        new = {token for row in rows if row.path == path for token in row.token_ids if token >= size}
        if not new or new != set(range(size, size + len(new))):
            return ()
    return tuple(tables)


def _match(
    path: str,
    name: str,
    indices: TokenIndices,
    header: Header,
    spec: BaseModelSpec,
    vocabulary: Vocabulary,
    field: str,
) -> StoredRows:
    site = spec.sites.get(path)
    if site is None or site.kind == "linear":
        raise BaseMismatch(
            f'tensor "{name}" replaces rows of "{path}", which is no embedding and no head of this base '
            f"({spec.model_type}). Use the base that the adapter was trained on.",
            tensor=name,
        )
    token_ids = _token_ids(path, indices, vocabulary)
    if token_ids is None:
        raise UnsupportedAdapter(
            f'tensor "{name}" replaces rows of tokens, but field "{field}" lists none for "{path}"; PEFT would drop '
            "them in silence. Correct the field, or remove the tensor.",
            tensor=name,
        )
    shape = list(require_matrix(header, name))
    width = site.out_features if site.kind == "embedding" else site.in_features
    if shape[0] != len(token_ids):
        raise MalformedAdapter(
            f'tensor "{name}" has {shape[0]} rows, but field "{field}" lists {len(token_ids)} tokens for "{path}", so '
            "which row is whose is unclear. Correct the field, or save the adapter again.",
            field=field,
            value=list(token_ids),
            tensor=name,
        )
    if shape[1] != width:
        raise BaseMismatch(
            f'tensor "{name}" has shape {shape}; "{path}" of this base has rows of width {width}. '
            "Use the base that the adapter was trained on.",
            tensor=name,
        )
    return StoredRows(path, name, token_ids)


def _token_ids(path: str, indices: TokenIndices, vocabulary: Vocabulary) -> tuple[int, ...] | None:
    """The tokens that the config lists for a table, or for the table of the same weight."""
    for table in (path, vocabulary.twin(path)):
        found = next((ids for entry, ids in indices.items() if table and _means(entry, table, vocabulary)), None)
        if found is not None:
            return found
    return None


def _means(entry: str | None, path: str, vocabulary: Vocabulary) -> bool:
    """Whether an entry of the config is about a table; names are compared from the end, letter by letter."""
    if entry is None:
        return vocabulary.embedding is not None and path == vocabulary.embedding.path
    return path.endswith(entry)


def _refuse_missing(entry: str | None, token_ids: tuple[int, ...], field: str) -> NoReturn:
    raise MalformedAdapter(
        f'field "{field}" lists {len(token_ids)} tokens of {"the input embedding" if entry is None else entry}, '
        "but the file has no rows for them. The file is incomplete; save or upload the adapter again.",
        field=field,
        value=list(token_ids),
    )


def _refuse_head_with_bias(row: StoredRows, spec: BaseModelSpec) -> None:
    site = spec.sites[row.path]
    if site.kind == "head" and site.has_bias:
        raise UnsupportedAdapter(
            f'tensor "{row.name}" replaces rows of "{row.path}", a head with a bias, which PEFT leaves out as soon as '
            "rows are replaced. Such adapters are not served; train a LoRA on the head instead.",
            tensor=row.name,
        )
