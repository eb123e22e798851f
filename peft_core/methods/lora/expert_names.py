"""Where a factor of a mixture's experts or router belongs, told from the path in its tensor's name.

    <experts>.base_layer.lora_A     stacked; the number of `base_layer` tells which of the targeted parameters it is
    <experts>.lora_A                stacked; the last of the targeted parameters, or the only one
    <router>.lora_A                 a matrix [experts, hidden_size]
    <block>.experts.3.w1.lora_A     of one expert: transformers 4 had a module for each matrix of each expert

Running example: Mixtral, whose block was called block_sparse_moe then
    model.layers.0.block_sparse_moe.experts.3.w1  ->  gate_up_proj of model.layers.0.mlp.experts, expert 3, upper half
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from peft_core.spec import BaseModelSpec

_SINGLE = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)")
_HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}  # of gate_up_proj
_DOWN = ("down_proj", "w2")


class Factors(NamedTuple):
    """Names of the two tensors of one path."""

    down: str
    up: str


class StackedPlace(NamedTuple):
    module: str  # path of the experts
    depth: int  # how many `base_layer` stood behind it


class SinglePlace(NamedTuple):
    parameter: str  # "<experts>.gate_up_proj", "<experts>.down_proj"
    expert: int
    half: int | None  # 0: the upper half of the outputs, 1: the lower; None: all of them


class RouterPlace(NamedTuple):
    parameter: str  # "<router>.weight"


Place = StackedPlace | SinglePlace | RouterPlace


class Stack(NamedTuple):
    """A parameter by its logical sizes."""

    experts: int  # 1: a router
    outputs: int
    inputs: int


def place_of(path: str, spec: BaseModelSpec) -> Place | None:
    """None where a path is neither of experts nor of a router that the base has."""
    module = re.sub(r"(\.base_layer)+$", "", path)
    if module in expert_modules(spec):
        return StackedPlace(module, path[len(module) :].count(".base_layer"))
    router = _renamed(path)
    if len(spec.expert_parameters.get(f"{router}.weight", ())) == 2:
        return RouterPlace(f"{router}.weight")
    found = _SINGLE.fullmatch(path)
    return None if found is None else _single(found, spec)


def expert_modules(spec: BaseModelSpec) -> dict[str, list[str]]:
    """Paths of all experts -> their stacked weights, in the order in which the module registers them."""
    modules: dict[str, list[str]] = {}
    for parameter, shape in spec.expert_parameters.items():
        if len(shape) == 3:
            modules.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return modules


def stack_of(parameter: str, spec: BaseModelSpec) -> Stack:
    shape = spec.expert_parameters[parameter]
    experts, rows, columns = shape if len(shape) == 3 else (1, *shape)
    return Stack(experts, columns, rows) if parameter in spec.transposed_experts else Stack(experts, rows, columns)


def matching_parameters(targets: Iterable[str], spec: BaseModelSpec) -> dict[str, list[str]]:
    """Each entry of target_parameters -> the weights it means: of experts, of routers, of linears."""
    names = [*spec.expert_parameters, *(f"{path}.weight" for path, site in spec.sites.items() if site.kind == "linear")]
    return {target: [name for name in names if name == target or name.endswith(f".{target}")] for target in targets}


def _single(found: re.Match[str], spec: BaseModelSpec) -> SinglePlace | None:
    module, expert, name = f"{_renamed(found['block'])}.experts", int(found["expert"]), found["name"]
    fused, down = f"{module}.gate_up_proj", f"{module}.down_proj"
    if name in _HALVES and fused in spec.expert_parameters:
        parameter, half = fused, _HALVES[name]
    elif name in _DOWN and down in spec.expert_parameters:
        parameter, half = down, None
    else:
        return None
    if parameter in spec.transposed_experts or expert >= spec.expert_parameters[parameter][0]:
        return None  # experts that transformers 4 kept apart are not transposed
    return SinglePlace(parameter, expert, half)


def _renamed(path: str) -> str:
    """transformers 5 calls Mixtral's block as those of all others."""
    return re.sub(r"\.block_sparse_moe(?=\.|$)", ".mlp", path)
