"""What is asked of the loader and what it answers: plain data that crosses the process border. No torch.

    front                               loader
    {"op": "configure", "target": ...}  {"op": "configured", "variant": ...}         once, after each start
    {"op": "prepare", "job": ...}       {"op": "prepared", "prepared": ...}  or  {"op": "refused", "error": ...}

One question, one answer: the front asks again when it has been answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class PackingTarget:
    """What every adapter is packed for."""

    spec: Mapping[str, Any]  # `BaseModelSpec.to_json()`
    adapter_dtype: str  # float32 | bfloat16 | float16
    base_directory: str = ""  # the base's files, for kinds that need its weights; "" where there are none
    base_dtype: str = "float32"  # that the base is served in
    max_dense_bytes: int = 256 << 20  # whole matrices of one adapter, see `peft_core.methods.whole_matrix.dense`

    @property
    def fingerprint(self) -> str:
        """Of the base."""
        return str(self.spec["fingerprint"])


@dataclass(frozen=True, slots=True)
class PrepareJob:
    """Read these files, check and decode them, and leave the packed image at `image_path`."""

    files: Mapping[str, str]  # relative path in the adapter -> where the bytes lie
    image_path: str


@dataclass(frozen=True, slots=True)
class Prepared:
    effect_digest: str  # "sha256:...", of canonical config and tensors
    num_bytes: int  # of the image's payload: what it takes on the device
    base_model: str | None  # as the adapter's config names it
    report: Mapping[str, Any]  # the load report; its "traits" are `AdapterTraits.to_json()`


class Loader(Protocol):
    """The loader, wherever it runs."""

    @property
    def target(self) -> PackingTarget: ...

    @property
    def variant(self) -> str:
        """Names what images are packed for; an image of another variant is of no use here."""
        ...

    async def prepare(self, job: PrepareJob) -> Prepared:
        """Raises AdapterRefused, LoaderUnavailable."""
        ...

    async def close(self) -> None: ...
