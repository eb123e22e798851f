"""FourierFT (https://arxiv.org/abs/2405.03003): an addition given by a few coefficients of its Fourier transform.

    base_model.model.<path>.fourierft_spectrum     [n_frequency]

    Semantics:
        y += D x,   D = scaling * the real part of ifft2(S),   S = the coefficients at their places (`spectrum`)

D is kept as a whole matrix: a few megabytes of file become as much as the base's own weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger
from peft_core.methods.report import MatchedSite
from peft_core.methods.targets import require_endings
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.whole_matrix.spectrum import read_seed, require_coefficients, scattered
from peft_core.spec import BaseModelSpec, Site

KIND = "FOURIERFT"
_SUFFIX = "fourierft_spectrum"
_DEFAULT_NUMBER = 1000
_DEFAULT_SCALING = 150.0


def plan_fourierft(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a FourierFT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "fourier_only"))
    starts_random = not ledger.use_flag("init_weights")
    scaling = ledger.use_number("scaling", _DEFAULT_SCALING)
    seed = read_seed(ledger, config)
    default_number = ledger.use_count("n_frequency") or _DEFAULT_NUMBER
    numbers = ledger.use_pattern_values("n_frequency_pattern")
    require_endings("n_frequency_pattern", numbers)
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_SUFFIX,))

    def match(site: Site, names: Names) -> MatchedSite:
        stated = numbers.get(_pattern_of(site.path, numbers), default_number)
        require_coefficients(header, names[_SUFFIX], site, stated)
        return MatchedSite(site.path, 0, scaling)

    def update(data: SiteData) -> SiteChange:
        spectrum = scattered(data.own[_SUFFIX], data.site, seed)
        return SiteChange(dense=torch.fft.ifft2(spectrum).real * scaling)

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, update)


def _pattern_of(path: str, patterns: Mapping[str, float]) -> str:
    """The first pattern that fits what follows one of the path's dots, else the path itself, as PEFT looks it up."""
    return next((pattern for pattern in patterns if re.match(rf".*\.{pattern}$", path)), path)
