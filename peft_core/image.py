"""An adapter as one contiguous image: packed once, loaded with one read and one copy.

The image holds, per site group, the down and up matrices of its members at their exact
ranks, cut into tiles so that any adapter can be addressed as rows of one common table:

    down  [tiles][in_features][DOWN_TILE]      members' ranks side by side, padded to whole tiles
    up    [out_tiles][rank][up_tile]           one block a member, exact rank

Every matrix starts at a multiple of `up_tile` elements, so a matrix of a resident adapter is a
run of whole rows in the tables `pool.view(-1, DOWN_TILE)` and `pool.view(-1, up_tile)`.
All other forms follow as plain tensors (`peft_core.parts`).

Running example: rank 16 on q, k, v of 512 -> (512, 128, 128), tile 64
    down  [3][512][16]      h = x @ down: columns 0..15 are q's, 16..31 k's, 32..47 v's
    up    q [8][16][64], k [2][16][64], v [2][16][64]
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from peft_core.errors import BaseMismatch, MalformedAdapter, UnsupportedAdapter
from peft_core.forms import AdapterForms, LinearDelta
from peft_core.parts import read_parts, write_parts
from peft_core.sites import DOWN_TILE, SiteGroup, site_groups, up_tile
from peft_core.spec import BaseModelSpec

PACKER_VERSION = 3  # in the header and in every image's key: another layout is another image
MAGIC = b"VENEERIM"
_PREFIX = struct.Struct("<8sII")  # MAGIC, bytes of the header that follows, its CRC-32
PAYLOAD_ALIGNMENT_BYTES = 4096
IMAGE_ALIGNMENT_BYTES = 256  # an extent starts here; a multiple of every tile row in every dtype
MAX_HEADER_BYTES = 64 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Image:
    """A packed adapter: `header` is plain JSON data, `payload` a flat tensor of one dtype on the host."""

    header: dict[str, Any]
    payload: torch.Tensor  # [num_elements], adapter dtype

    @property
    def num_bytes(self) -> int:
        return self.payload.numel() * self.payload.element_size()


def image_key(effect_digest: str, fingerprint: str, dtype: str) -> str:
    """Names the image file of one adapter's effect on one base; another packer version is another key."""
    text = f"{effect_digest}|{fingerprint}|{dtype}|tp0of1|packer{PACKER_VERSION}"
    return hashlib.sha256(text.encode()).hexdigest()


def pack(forms: AdapterForms, spec: BaseModelSpec, dtype: str) -> Image:
    """Lay out all forms of one adapter.

    Raises:
        BaseMismatch: a form names a site that the base does not have.
        UnsupportedAdapter: two forms at one site whose order would matter.
        MalformedAdapter: a value overflows to infinity in `dtype`.
    """
    _check_places(forms, spec)
    builder = _ImageBuilder(DTYPES[dtype], up_tile(spec))
    sites = [builder.add(group, forms.linear) for group in site_groups(spec) if _touches(group, forms.linear)]
    parts = write_parts(forms, builder.append)
    payload = builder.finish()
    header = {
        "packer_version": PACKER_VERSION,
        "dtype": dtype,
        "up_tile": builder.tile,
        "fingerprint": spec.fingerprint,
        "num_bytes": payload.numel() * payload.element_size(),
        "sites": sites,
        "parts": parts,
        "invocation_tokens": list(forms.invocation_tokens),
        "vocab_size": forms.vocab_size,
    }
    return Image(header, payload)


def _check_places(forms: AdapterForms, spec: BaseModelSpec) -> None:
    linear = {path for group in site_groups(spec) for path in group.paths}
    known: tuple[tuple[str, Iterable[str], Collection[str]], ...] = (
        ("linear site", forms.linear, linear),
        ("linear site", (*forms.changes, *forms.head_rows), linear - set(spec.blocks)),
        ("embedding", forms.embeddings, spec.sites),
        ("norm", forms.norms, spec.norms),
        ("block that a bottleneck could stand beside", forms.bottlenecks, spec.blocks),
        ("expert weight", forms.experts, spec.expert_parameters),
    )
    for what, paths, places in known:
        for path in paths:
            if path not in places:
                raise BaseMismatch(f"the adapter changes {path}, which is no {what} of this base.")
    for path, change in forms.changes.items():
        turns_input = change.input_gain is not None or change.rotation is not None
        adds = path in forms.linear or change.dense is not None or change.kron_left is not None
        if turns_input and (adds or change.replacement is not None):
            raise UnsupportedAdapter(
                f"{path} has both a changed input and an addition; no known kind has both, so their order is unclear."
            )


def _touches(group: SiteGroup, linear: Mapping[str, LinearDelta]) -> bool:
    return any(path in linear for path in group.paths)


class _ImageBuilder:
    """Appends parts at aligned element offsets."""

    def __init__(self, dtype: torch.dtype, tile: int) -> None:
        self.dtype, self.tile = dtype, tile
        self.parts: list[torch.Tensor] = []
        self.num_elements = 0

    def add(self, group: SiteGroup, linear: Mapping[str, LinearDelta]) -> dict[str, Any]:
        members = [linear.get(path) for path in group.paths]
        ranks = [0 if member is None else member.rank for member in members]
        downs = [member.down for member in members if member is not None]
        down = torch.cat(downs).to(self.dtype).T  # [in, sum of ranks]
        tiles = -(-sum(ranks) // DOWN_TILE)
        down = pad(down, (0, tiles * DOWN_TILE - sum(ranks)))
        down_offset = self.append(down.view(group.in_features, tiles, DOWN_TILE).permute(1, 0, 2), group.leader)
        ups = [0 if member is None else self.append(self._up_tiles(member.up), path)
               for member, path in zip(members, group.paths, strict=True)]  # fmt: skip
        return {"leader": group.leader, "tiles": tiles, "down": down_offset, "ranks": ranks, "ups": ups}

    def _up_tiles(self, up: torch.Tensor) -> torch.Tensor:
        out, rank = up.shape
        out_tiles = -(-out // self.tile)
        columns = pad(up.to(self.dtype).T, (0, out_tiles * self.tile - out))  # [rank, out_tiles * tile]
        return columns.view(rank, out_tiles, self.tile).permute(1, 0, 2)

    def append(self, part: torch.Tensor, path: str) -> int:
        part = part.to(self.dtype)
        if not torch.isfinite(part).all():
            raise MalformedAdapter(
                f"a weight of {path} is not finite in {self.dtype}: serve it with --adapter-dtype float32, "
                "or retrain it if the file itself holds NaN or infinity."
            )
        offset = self.num_elements
        flat = part.reshape(-1)
        padding = -flat.numel() % (IMAGE_ALIGNMENT_BYTES // self.dtype.itemsize)
        self.parts.append(pad(flat, (0, padding)))
        self.num_elements += flat.numel() + padding
        return offset

    def finish(self) -> torch.Tensor:
        return torch.cat(self.parts) if self.parts else torch.zeros(0, dtype=self.dtype)


def unpack(image: Image, spec: BaseModelSpec) -> AdapterForms:
    """The inverse of `pack`, in the image's dtype (tests, and the reference's view of a resident adapter)."""
    groups = {group.leader: group for group in site_groups(spec)}
    linear: dict[str, LinearDelta] = {}
    for site in image.header["sites"]:
        linear.update(site_views(site, groups[site["leader"]], image.payload, image.header["up_tile"]))
    return read_parts(image.header, image.payload, linear)


def site_views(site: dict[str, Any], group: SiteGroup, payload: torch.Tensor, tile: int) -> dict[str, LinearDelta]:
    """The members' matrices of one packed site, copied out of the tiles."""
    tiles, in_features = site["tiles"], group.in_features
    down = payload[site["down"] :][: tiles * in_features * DOWN_TILE].view(tiles, in_features, DOWN_TILE)
    rows = down.permute(0, 2, 1).reshape(tiles * DOWN_TILE, in_features)
    deltas, first = {}, 0
    for path, out, rank, up in zip(group.paths, group.out_features, site["ranks"], site["ups"], strict=True):
        if rank:
            out_tiles = -(-out // tile)
            blocks = payload[up:][: out_tiles * rank * tile].view(out_tiles, rank, tile)
            columns = blocks.permute(1, 0, 2).reshape(rank, out_tiles * tile)[:, :out]
            deltas[path] = LinearDelta(rows[first : first + rank], columns.T)
        first += rank
    return deltas


def write_image(path: Path, image: Image) -> None:
    """Write atomically: a reader sees the whole image or none."""
    payload = image.payload.contiguous().view(torch.uint8).numpy().data
    header = json.dumps({**image.header, "crc32": zlib.crc32(payload)}).encode()
    start = _payload_start(len(header))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(_PREFIX.pack(MAGIC, len(header), zlib.crc32(header)) + header)
        file.seek(start)
        file.write(payload)
        file.truncate(start + payload.nbytes)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of an image file and the byte offset of its payload.

    Raises:
        MalformedAdapter: the file is no image of this packer version, or is shorter than it says.
    """
    with path.open("rb") as file:
        start = file.read(_PREFIX.size)
        if len(start) < _PREFIX.size or not start.startswith(MAGIC):
            raise MalformedAdapter(f"{path.name} is not an adapter image. It is rebuilt when deleted.")
        _, length, checksum = _PREFIX.unpack(start)
        text = file.read(min(length, MAX_HEADER_BYTES))
    if zlib.crc32(text) != checksum:  # a flipped bit could still be JSON, and lead the kernels astray
        raise MalformedAdapter(f"{path.name} has a damaged header. It is rebuilt when deleted.")
    header: dict[str, Any] = json.loads(text)
    if header.get("packer_version") != PACKER_VERSION:
        raise MalformedAdapter(f"{path.name} was packed by another version. It is rebuilt when deleted.")
    offset = _payload_start(length)
    if path.stat().st_size < offset + header["num_bytes"]:
        raise MalformedAdapter(f"{path.name} is truncated. It is rebuilt when deleted.")
    return header, offset


def _payload_start(header_bytes: int) -> int:
    return -(-(_PREFIX.size + header_bytes) // PAYLOAD_ALIGNMENT_BYTES) * PAYLOAD_ALIGNMENT_BYTES
