"""Adapters whose change has no structure to serve it by: one whole matrix a module, and a limit to their size.

    dense bytes = 4 * out_features * in_features, summed over the modules         float32, as decoded

Such an adapter is a private copy of part of the base: every row of a batch that uses it multiplies with it. They are
served up to a limit, so that one upload cannot take the memory of hundreds of small adapters.

Running example: FourierFT on q_proj and v_proj of 32 layers with hidden size 4096
    32 * 2 * 4096 * 4096 * 4 B = 4.3 GB     refused, unless the limit is raised
"""

from __future__ import annotations

from collections.abc import Iterable

from peft_core.errors import UnsupportedAdapter
from peft_core.methods.report import DecodeReport
from peft_core.spec import Site

MAX_DENSE_BYTES = 256 << 20  # of one adapter
FLAG = "--max-dense-adapter-bytes"
_VALUE_BYTES = 4


def dense_bytes(sites: Iterable[Site]) -> int:
    """What whole matrices at these modules take."""
    return sum(_VALUE_BYTES * site.out_features * site.in_features for site in sites)


def require_dense_fits(report: DecodeReport, limit: int) -> None:
    """Raises UnsupportedAdapter, telling size and remedy, where an adapter's whole matrices exceed a limit of bytes."""
    if report.dense_bytes <= limit:
        return
    raise UnsupportedAdapter(
        f'peft_type "{report.kind}": its change cannot be kept smaller than whole matrices, and those of '
        f"{len(report.sites)} modules take {report.dense_bytes} bytes; the limit for one adapter is {limit}. "
        f"Raise {FLAG}, adapt fewer modules, or merge the adapter into a copy of the base.",
        code="dense_adapter_too_large",
        field="peft_type",
        value=report.kind,
    )
