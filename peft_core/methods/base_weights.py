"""The base's weights as a decoder may need them: one tensor at a time, on the host, as the architecture names them.

Most kinds are decoded without them. Some need a few: DoRA a norm of each weight, PiSSA its first singular vectors, a
replaced bias the bias that it replaces. Who keeps the weights, and where, is not known here: a checkpoint on disk and
a model in a test both serve.
"""

from __future__ import annotations

from typing import Protocol

import torch

from peft_core.errors import UnsupportedAdapter


class BaseWeights(Protocol):
    """Paths are those of `BaseModelSpec`; every tensor is float32 and whole, and must not be changed."""

    def weight(self, path: str) -> torch.Tensor:
        """The weight of a module.

        Args:
            path: of a linear or the head ([out, in], a Conv1D turned back), of an embedding ([rows, width]), of a norm
                ([width]), or "<module>.<parameter>" of stacked experts (as stored).
        """
        ...

    def bias(self, path: str) -> torch.Tensor | None:
        """The bias of a linear ([out]) or of a norm ([width]); None where the module has none."""
        ...


def require_base(base: BaseWeights | None, what: str) -> BaseWeights:
    """The weights, or a refusal.

    Args:
        what: begins the sentence: "DoRA".

    Raises:
        UnsupportedAdapter: there are none.
    """
    if base is not None:
        return base
    raise UnsupportedAdapter(
        f"{what} is decoded with the base's weights, which are not at hand here. "
        "Serve the base from a checkpoint whose weights can be read.",
        code="base_weights_needed",
    )
