"""What it costs to take the base's weights apart, for the kinds that need their singular values.

    seconds on one core = about 1e-9 * (smaller side)^2 * larger side, a weight     measured, float32

Running example: 24 layers of Qwen2.5-0.5B, all linears -> about three minutes
"""

from __future__ import annotations

from collections.abc import Collection

from peft_core.spec import BaseModelSpec

_SECONDS_PER_STEP = 1e-9
_WORTH_TELLING_S = 60.0


def decomposition_warnings(kind: str, paths: Collection[str], spec: BaseModelSpec) -> tuple[str, ...]:
    """A sentence where decoding an adapter will take long. Paths that the base lacks do not count."""
    sites = [spec.sites[path] for path in paths if path in spec.sites]
    sides = [sorted((site.in_features, site.out_features)) for site in sites]
    seconds = _SECONDS_PER_STEP * sum(small * small * large for small, large in sides)
    if seconds < _WORTH_TELLING_S:
        return ()
    minutes = round(seconds / 60)
    return (f"{kind} takes apart {len(sites)} weights of the base: about {minutes} minutes on one core.",)
