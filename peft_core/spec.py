"""What a decoder must know about the base model, without holding the model.

A spec is taken from a plain model, before anything of ours replaces its modules, and travels between processes as
JSON. It lists every module that an adapter may name: linears, embeddings and the head as sites with their sizes, norms,
the blocks beside which a bottleneck may stand, and the stacked weights of experts; everything else (activations,
containers) by path only, so that an adapter that aims at one of them is refused by name. It does not hold weights.

Running example: GPT-2 with hidden size 768
    sites["transformer.h.0.attn.c_attn"] = Site(path, "linear", 768, 2304, has_bias=True, transposed=True)
    sites["transformer.wte"]             = Site(path, "embedding", 50257, 768, has_bias=False, transposed=False)
    sites["lm_head"]                     = Site(path, "head", 768, 50257, has_bias=False, transposed=False)
    other_modules                        = ("transformer", "transformer.drop", "transformer.h", ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

SiteKind = Literal["linear", "embedding", "head"]


@dataclass(frozen=True, slots=True)
class Site:
    """One module that an adapter may change. Sizes are logical: `transposed` does not swap them."""

    path: str  # as `named_modules()` of the model says it
    kind: SiteKind  # "head" is the linear that makes the logits, tied or not
    in_features: int  # of an embedding: rows of the table
    out_features: int  # of an embedding: width of a row
    has_bias: bool
    transposed: bool  # the weight is stored [in, out], as `transformers.Conv1D` does


class NormSite(NamedTuple):
    """A normalisation with a weight of its own."""

    width: int
    epsilon: float
    has_bias: bool
    row_dim: int = 1  # which dimension of its input counts the rows of a step, found by tracing


class BlockSite(NamedTuple):
    """An attention or a feed-forward block of a decoder layer, found by tracing."""

    path: str  # the block; its output, or the first of its outputs, is [..., width]
    norm: str  # the norm that reads the residual stream and whose output the block reads
    width: int  # hidden size


@dataclass(frozen=True, slots=True)
class BaseModelSpec:
    model_type: str  # as in the model's config.json
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_position: int | None  # tokens; None where the architecture sets no bound
    tie_word_embeddings: bool  # embedding and head share one weight (they are still two sites)
    fingerprint: str  # identity of the weights, see `peft_core.fingerprint`
    sites: Mapping[str, Site]  # by path, in the model's order
    other_modules: tuple[str, ...]  # paths of everything else, expert parameters included
    name: str | None = None  # what the base calls itself; compared in a warning, never in a decision
    input_groups: tuple[tuple[str, ...], ...] = ()  # linear sites that read one tensor, see `peft_core.trace`
    norms: Mapping[str, NormSite] = field(default_factory=dict)  # by path
    blocks: Mapping[str, BlockSite] = field(default_factory=dict)  # by path, see `peft_core.trace`
    expert_parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # as stored; routers' [experts, in]
    transposed_experts: tuple[str, ...] = ()  # of these parameters, which are stored [experts, in, out]
    num_kv_heads: int = 0  # 0: not known
    head_dim: int = 0

    @classmethod
    def from_model(cls, model: Any, fingerprint: str, name: str | None = None) -> BaseModelSpec:
        """Describe a plain `transformers` causal LM; `model` is not changed.

        Args:
            name: how the model was asked for; without it, the name that the model remembers.
        """
        config = model.config.get_text_config()
        head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
        sites: dict[str, Site] = {}
        norms: dict[str, NormSite] = {}
        experts: dict[str, tuple[int, ...]] = {}
        others: list[str] = []
        transposed: list[str] = []
        routers = dict(_routers(model))
        for path, module in model.named_modules():
            if not path:
                continue
            site = _site(path, module, is_head=module is head)
            if site is not None:
                sites[path] = site
                continue
            norm = _norm(module)
            if norm is not None:
                norms[path] = norm
            stacked = dict(_stacked_parameters(path, module))
            if _is_experts(module):
                experts.update(stacked)
                transposed += stacked if module.is_transposed else ()
            elif path in routers:
                experts[f"{path}.weight"] = routers[path]
            others += [path, *stacked]
        return cls(
            model_type=str(model.config.model_type),
            hidden_size=int(config.hidden_size),
            num_layers=int(config.num_hidden_layers),
            vocab_size=int(config.vocab_size),
            max_position=getattr(config, "max_position_embeddings", None),
            tie_word_embeddings=head is not None and head.weight is tokens.weight,
            fingerprint=fingerprint,
            sites=sites,
            other_modules=tuple(others),
            name=name or model.config.name_or_path or None,
            norms=norms,
            expert_parameters=experts,
            transposed_experts=tuple(transposed),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` of it equals this spec."""
        plain = {field: getattr(self, field) for field in _PLAIN_FIELDS}
        sites = [list(asdict(site).values()) for site in self.sites.values()]
        return {
            **plain,
            "sites": sites,
            "other_modules": list(self.other_modules),
            "input_groups": [list(group) for group in self.input_groups],
            "norms": {path: list(norm) for path, norm in self.norms.items()},
            "blocks": [list(block) for block in self.blocks.values()],
            "expert_parameters": {path: list(shape) for path, shape in self.expert_parameters.items()},
            "transposed_experts": list(self.transposed_experts),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BaseModelSpec:
        """The spec that `to_json` wrote.

        Raises:
            KeyError, TypeError: the data is not what `to_json` writes.
        """
        plain = {field: data[field] for field in _PLAIN_FIELDS}
        sites = [Site(*row) for row in data["sites"]]
        return cls(
            **plain,
            sites={site.path: site for site in sites},
            other_modules=tuple(data["other_modules"]),
            input_groups=tuple(tuple(group) for group in data["input_groups"]),
            norms={path: NormSite(*norm) for path, norm in data["norms"].items()},
            blocks={block[0]: BlockSite(*block) for block in data["blocks"]},
            expert_parameters={path: tuple(shape) for path, shape in data["expert_parameters"].items()},
            transposed_experts=tuple(data["transposed_experts"]),
        )


_PLAIN_FIELDS = (
    "model_type",
    "hidden_size",
    "num_layers",
    "vocab_size",
    "max_position",
    "tie_word_embeddings",
    "fingerprint",
    "name",
    "num_kv_heads",
    "head_dim",
)


def _site(path: str, module: nn.Module, *, is_head: bool) -> Site | None:
    if isinstance(module, nn.Embedding):
        return Site(path, "embedding", module.num_embeddings, module.embedding_dim, has_bias=False, transposed=False)
    kind: SiteKind = "head" if is_head else "linear"
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Site(path, kind, module.in_features, module.out_features, has_bias, transposed=False)
    if is_conv1d(module):
        num_inputs, num_outputs = module.get_parameter("weight").shape
        return Site(path, kind, num_inputs, num_outputs, has_bias, transposed=True)
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is `transformers.pytorch_utils.Conv1D`: a linear whose weight is stored [in, out]."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in type(module).__mro__
    )


def _norm(module: nn.Module) -> NormSite | None:
    """A leaf whose only parameters are a vector named weight and perhaps one named bias, with an epsilon."""
    parameters = dict(module.named_parameters(recurse=False))
    epsilon = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if epsilon is None or "weight" not in parameters or set(parameters) - {"weight", "bias"}:
        return None
    if any(parameter.dim() != 1 for parameter in parameters.values()) or list(module.children()):
        return None
    return NormSite(len(parameters["weight"]), float(epsilon), "bias" in parameters)


def _stacked_parameters(path: str, module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights with a dimension more than a matrix: no module of its own stands for them."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 3:
            yield f"{path}.{name}", tuple(parameter.shape)


def _is_experts(module: nn.Module) -> bool:
    """Whether it is called as all experts of transformers are, see `peft_core.hooks.experts`."""
    return all(hasattr(module, name) for name in ("num_experts", "is_transposed", "has_gate", "has_bias"))


def _routers(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Siblings of experts that have one row of weights an expert, and are no linear."""
    for path, block in model.named_modules():
        counts = {child.num_experts for child in block.children() if _is_experts(child)}
        for name, child in block.named_children() if counts else ():
            weight = dict(child.named_parameters(recurse=False)).get("weight")
            if weight is not None and weight.dim() == 2 and len(weight) in counts:
                yield f"{path}.{name}", tuple(weight.shape)
