"""Whether a version can be used by this process: its bytes are there, and it was checked against this base."""

from __future__ import annotations

from adapters_store.index import READY, Mark
from adapters_store.layout import Layout
from adapters_store.record import AdapterVersion, VersionState


def judge(layout: Layout, version: AdapterVersion, base_fingerprint: str) -> Mark:
    """(state, reason). Looks at sizes, not into files: `fsck` does that."""
    reason = _find_damage(layout, version)
    if reason is not None:
        return VersionState.FAILED, reason
    if version.content.base_fingerprint != base_fingerprint:
        return VersionState.INCOMPATIBLE, _incompatible_reason(version, base_fingerprint)
    return READY


def _incompatible_reason(version: AdapterVersion, base_fingerprint: str) -> str:
    return (
        f"{version} was committed for the base {version.content.base_fingerprint[:19]}..., and this server's is "
        f"{base_fingerprint[:19]}.... Upload it again to have it checked against this base."
    )


def _find_damage(layout: Layout, version: AdapterVersion) -> str | None:
    for file in version.files:
        size = layout.blob_size(file.sha256)
        if size is None:
            return f"the bytes of {file.path} are gone from the store. Upload the adapter again."
        if size != file.size:
            return f"{file.path} has {size} bytes in the store instead of {file.size}. Upload the adapter again."
    return None
