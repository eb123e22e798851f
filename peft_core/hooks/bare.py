"""A module as the model made it, to be called from inside its own hook."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def without_hooks(module: nn.Module) -> Any:
    """A copy that shares parameters and children, and calls no hook."""
    bare: Any = copy.copy(module)
    bare._forward_hooks, bare._forward_hooks_with_kwargs, bare._forward_pre_hooks = {}, {}, {}
    return bare
