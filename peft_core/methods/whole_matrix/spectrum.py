"""A few trained coefficients at random places of a matrix: what FourierFT and WaveFT store for a module.

    places = the first n of a random permutation of all out * in places, drawn anew from one seed for every module

The places are not in the file: PyTorch's generator gives the same ones from the seed.

Running example: seed 777, n = 1000 at a module of 64 x 64
    scattered(values [1000], site, 777)     -> [64, 64], 1000 of them not zero
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_core.errors import MalformedAdapter
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.refusals import contradiction
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.site_tensors import shape_of
from peft_core.spec import Site

_SEED_FIELD = "random_loc_seed"
_DEFAULT_SEED = 777
MAX_SEED = 2**63


def read_seed(ledger: ConfigLedger, config: Mapping[str, Any]) -> int:
    """The seed of the places, from the field "random_loc_seed".

    Args:
        config: the ledger's own, which tells null from absent.

    Raises:
        UnsupportedAdapter: it is null, so that nobody knows the places.
        MalformedAdapter: it is no integer of 64 bits.
    """
    seed = ledger.use_size(_SEED_FIELD)
    if _SEED_FIELD in config and config[_SEED_FIELD] is None:
        refuse(
            _SEED_FIELD,
            None,
            "the places of the coefficients were drawn from it and are not stored. Train with a seed.",
        )
    if seed is not None and seed >= MAX_SEED:
        raise MalformedAdapter(
            f'field "{_SEED_FIELD}" = {seed}; expected an integer of 64 bits. Correct adapter_config.json.',
            field=_SEED_FIELD,
            value=seed,
        )
    return _DEFAULT_SEED if seed is None else seed


def require_coefficients(header: Header, name: str, site: Site, stated: float | None) -> None:
    """Hold the number of coefficients against the field "n_frequency".

    Args:
        stated: by the config; None where it does not say it.

    Raises:
        MalformedAdapter: the config says another, or there are more than places.
    """
    (number,) = shape_of(header, name, site, (None,))
    if stated is not None and number != stated:
        raise contradiction(name, f"has {number} coefficients", "n_frequency", stated)
    if number > site.out_features * site.in_features:
        raise MalformedAdapter(
            f'tensor "{name}" has {number} coefficients, more than the weight of "{site.path}" has places. '
            "Use the base that the adapter was trained on.",
            tensor=name,
        )


def scattered(values: torch.Tensor, site: Site, seed: int) -> torch.Tensor:
    """The coefficients at their places.  # [out_features, in_features] float32"""
    total = site.out_features * site.in_features
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: len(values)]
    spectrum = torch.zeros(total)
    spectrum[places] = values
    return spectrum.reshape(site.out_features, site.in_features)
