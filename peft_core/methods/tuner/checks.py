"""Questions that the planners of several kinds ask a config: which modules, which rank, which whole number.

Running example: target_modules ["q_proj"] over three layers
    targeted_paths(config, spec)  -> ("model.layers.0.self_attn.q_proj", "model.layers.1. ...", "model.layers.2. ...")
"""

from __future__ import annotations

from collections.abc import Collection

from peft_core.errors import MalformedAdapter, UnsupportedAdapter, shown
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.targets import targeted_sites
from peft_core.methods.tuner.config import TunerConfig
from peft_core.spec import BaseModelSpec, SiteKind

LINEAR: tuple[SiteKind, ...] = ("linear", "head")


def targeted_paths(
    config: TunerConfig, spec: BaseModelSpec, kinds: Collection[SiteKind] = LINEAR
) -> tuple[str, ...] | None:
    """Modules that the config means, in the base's order; None where it names none.

    Args:
        kinds: of modules that the adapter's kind can change.
    """
    if config.rule is None:
        return None
    targeted = targeted_sites(config.rule, spec, kinds)
    return tuple(path for path in spec.sites if path in targeted)


def require_targets(config: TunerConfig, spec: BaseModelSpec, kinds: Collection[SiteKind] = LINEAR) -> tuple[str, ...]:
    """As `targeted_paths`.

    Raises:
        UnsupportedAdapter: the config names none, and nothing else does.
    """
    targeted = targeted_paths(config, spec, kinds)
    if not targeted:
        raise UnsupportedAdapter(
            'field "target_modules" is empty, and nothing else says which modules the shared values belong to. '
            "Name the modules that the adapter was trained on.",
            field="target_modules",
            value=None,
        )
    return targeted


def require_rank(config: TunerConfig, path: str, name: str, rank: int, default: int) -> None:
    """Raises MalformedAdapter where the config claims another rank for a module than its tensor has."""
    stated = config.rank(path, default)
    if stated != rank:
        raise MalformedAdapter(
            f'tensor "{name}" has rank {rank}, but the config says {shown(stated)} for this module. '
            "Correct r and rank_pattern; the first pattern that fits a module counts.",
            tensor=name,
        )


def whole_number(ledger: ConfigLedger, field: str, default: int, limit: int = 2**62) -> int:
    """Take a field that is an integer from 0 to below the limit: a seed, or a count that may be 0.

    Raises:
        MalformedAdapter: it is something else.
    """
    value = ledger.use(field, default)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit:
        return value
    raise MalformedAdapter(
        f'field "{field}" = {shown(value)}; expected an integer from 0 to {limit - 1}. Correct adapter_config.json.',
        field=field,
        value=value,
    )
