"""WaveFT: an addition given by a few coefficients of its wavelet transform.

    base_model.model.<path>.waveft_spectrum     [n_frequency]

    Semantics:
        y += D x
        D = scaling * the middle of waverec2(S)     S = the coefficients at their places (`spectrum`), zeros around them
        D = scaling * S                             use_idwt false

The zeros around S make up for what longer wavelets cut off at the borders; S is then read as four quarters, one for
each band. D is kept as a whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from peft_core.forms import SiteChange
from peft_core.methods.ledger import ConfigLedger, refuse
from peft_core.methods.report import MatchedSite
from peft_core.methods.targets import first_match, require_endings
from peft_core.methods.tensors import Header
from peft_core.methods.tuner.config import read_tuner_config
from peft_core.methods.tuner.file import sort_tuner_file
from peft_core.methods.tuner.plan import Names, SiteData, TunerDraft, TunerPlan
from peft_core.methods.whole_matrix.spectrum import read_seed, require_coefficients, scattered
from peft_core.methods.whole_matrix.wavelets import FILTERS, reconstructed
from peft_core.spec import BaseModelSpec, Site

KIND = "WAVEFT"
_SUFFIX = "waveft_spectrum"
_DEFAULT_NUMBER = 2592
_DEFAULT_SCALING = 25.0


def plan_waveft(config: Mapping[str, Any], header: Header, spec: BaseModelSpec) -> TunerPlan:
    """Decide everything about a WaveFT adapter from its config and its header.

    Raises:
        UnsupportedAdapter, MalformedAdapter, BaseMismatch: naming the field or the tensor that is to blame.
    """
    ledger = ConfigLedger(config)
    tuner = read_tuner_config(ledger, biases=("all", "waveft_only"))
    starts_random = not ledger.use_flag("init_weights", True)
    scaling = ledger.use_number("scaling", _DEFAULT_SCALING)
    seed = read_seed(ledger, config)
    family = _read_family(ledger)
    default_number = ledger.use_count("n_frequency") or _DEFAULT_NUMBER
    numbers = ledger.use_pattern_values("n_frequency_pattern")
    require_endings("n_frequency_pattern", numbers)
    is_proportional = ledger.use_flag("proportional_parameters")
    ledger.close()
    file = sort_tuner_file(header, spec, suffixes=(_SUFFIX,))

    def match(site: Site, names: Names) -> MatchedSite:
        pattern = first_match(numbers, site.path)
        stated = None if is_proportional else default_number if pattern is None else pattern
        require_coefficients(header, names[_SUFFIX], site, stated)
        return MatchedSite(site.path, 0, scaling)

    def update(data: SiteData) -> SiteChange:
        spectrum = scattered(data.own[_SUFFIX], data.site, seed)
        return SiteChange(dense=scaling * (spectrum if family is None else _transformed(spectrum, family)))

    draft = TunerDraft(KIND, tuner, file, header, spec, ledger.irrelevant, starts_random=starts_random)
    return draft.plan(match, update)


def _read_family(ledger: ConfigLedger) -> str | None:
    """The wavelet; None where the coefficients are used as they are."""
    family, is_transformed = ledger.use("wavelet_family", "db1"), ledger.use_flag("use_idwt", True)
    if not is_transformed:
        return None
    if not isinstance(family, str) or family not in FILTERS:
        refuse("wavelet_family", family, f"PEFT computes with {', '.join(FILTERS)} only. Train with one of them.")
    return family


def _transformed(spectrum: torch.Tensor, family: str) -> torch.Tensor:
    num_outputs, num_inputs = spectrum.shape
    cut_off = len(FILTERS[family]) - 2
    padded = _padded(_padded(spectrum, cut_off).T, cut_off).T
    result = reconstructed(padded, FILTERS[family])
    top, left = (result.shape[0] - num_outputs) // 2, (result.shape[1] - num_inputs) // 2
    return result[top : top + num_outputs, left : left + num_inputs].contiguous()


def _padded(matrix: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows of zeros above and below, so many in all, and one more where their sum with the matrix is odd."""
    num_rows += (matrix.shape[0] + num_rows) % 2
    return functional.pad(matrix, (0, 0, num_rows // 2, num_rows - num_rows // 2))
