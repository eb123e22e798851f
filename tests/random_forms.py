"""Random forms of every type that act on a base, so that the runtime can be tested without any file or decoder."""

from __future__ import annotations

import torch

from peft_core.forms import AdapterForms, Bottleneck, EmbeddingChange, HeadRows, LinearDelta, NormWeights, SiteChange
from peft_core.spec import BaseModelSpec

STRENGTH = 0.3


class RandomForms:
    """Adapters of one form each; the same seed gives the same adapter."""

    def __init__(self, spec: BaseModelSpec, seed: int) -> None:
        self.spec = spec
        self.random = torch.Generator().manual_seed(seed)
        self.linear = [path for path, site in spec.sites.items() if site.kind == "linear"]
        self.head = next(path for path, site in spec.sites.items() if site.kind == "head")
        self.embedding = next(path for path, site in spec.sites.items() if site.kind == "embedding")

    def normal(self, *shape: int, strength: float = STRENGTH) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random) * strength

    def delta(self, inputs: int, outputs: int, rank: int = 4) -> LinearDelta:
        return LinearDelta(self.normal(rank, inputs), self.normal(outputs, rank))

    def lora(self) -> AdapterForms:
        sites = [self.spec.sites[path] for path in self.linear]
        return AdapterForms({site.path: self.delta(site.in_features, site.out_features) for site in sites})

    def changed(self, name: str) -> AdapterForms:
        return AdapterForms(changes={path: self._change(name, path) for path in self.linear})

    def _change(self, name: str, path: str) -> SiteChange:
        inputs, outputs = self.spec.sites[path].in_features, self.spec.sites[path].out_features
        if name == "gain":
            return SiteChange(gain=1 + self.normal(outputs), shift=self.normal(outputs))
        if name == "input_gain":
            return SiteChange(input_gain=1 + self.normal(inputs))
        if name == "rotation":
            return SiteChange(rotation=torch.eye(8) + self.normal(inputs // 8, 8, 8))
        if name == "turn":
            return SiteChange(cos=1 + self.normal(outputs), sin=self.normal(outputs), turn_group=8)
        if name == "dense":
            return SiteChange(dense=self.normal(outputs, inputs, strength=0.05))
        if name == "replacement":
            return SiteChange(replacement=self.normal(outputs, inputs, strength=0.15))
        assert name == "kron"
        return SiteChange(
            kron_left=self.normal(outputs // 8, inputs // 4), kron_right=self.normal(8, 4, strength=STRENGTH / 3)
        )

    def norms(self) -> AdapterForms:
        return AdapterForms(
            norms={
                path: NormWeights(
                    weight=1 + self.normal(norm.width), bias=self.normal(norm.width) if norm.has_bias else None
                )
                for path, norm in self.spec.norms.items()
            }
        )

    def tables(self) -> AdapterForms:
        """Embedding and head: a low rank, a gain, replaced rows."""
        site = self.spec.sites[self.embedding]
        ids = (3, 5, 8, 13, 21, 34, 55, 89, 144)
        embedding = EmbeddingChange(
            down=self.normal(4, site.in_features),
            up=self.normal(site.out_features, 4),
            gain=1 + self.normal(site.out_features),
            token_ids=ids,
            rows=self.normal(len(ids), site.out_features),
        )
        head = HeadRows(ids, self.normal(len(ids), self.spec.sites[self.head].in_features))
        return AdapterForms(embeddings={self.embedding: embedding}, head_rows={self.head: head})

    def head_replaced(self) -> AdapterForms:
        site = self.spec.sites[self.head]
        return AdapterForms(
            changes={self.head: SiteChange(replacement=self.normal(site.out_features, site.in_features))}
        )

    def bottlenecks(self, first: Bottleneck, second: Bottleneck) -> AdapterForms:
        """`first` and `second` at alternating blocks, with biases and norms filled in where asked for by a flag."""
        blocks = list(self.spec.blocks.values())
        chosen = [first if index % 2 else second for index in range(len(blocks))]
        return AdapterForms(
            linear={block.path: self.delta(block.width + 1, block.width, rank=6) for block in blocks},
            bottlenecks={block.path: one for block, one in zip(blocks, chosen, strict=True)},
        )

    def every(self) -> dict[str, AdapterForms]:
        """By name; what the base has no place for is left out."""
        names = ("gain", "input_gain", "rotation", "turn", "dense", "replacement", "kron")
        forms = {name: self.changed(name) for name in names}
        forms |= {"lora": self.lora(), "norms": self.norms(), "tables": self.tables(), "head": self.head_replaced()}
        if self.spec.blocks:
            width = self.spec.hidden_size
            plain = Bottleneck("relu", "h + r", up_bias=self.normal(width))
            twice = Bottleneck("silu", "h", residual=1.0, up_bias=self.normal(width))
            parallel = Bottleneck("gelu_new", "r")
            normed = Bottleneck(
                "gelu", "h", norm_in_weight=1 + self.normal(width), norm_in_bias=self.normal(width),
                norm_out_weight=1 + self.normal(width), norm_out_bias=self.normal(width), norm_out_of="h + a",
            )  # fmt: skip
            rms = Bottleneck("tanh", "h + r", norm_in_weight=1 + self.normal(width))
            forms |= {"bottleneck": self.bottlenecks(plain, parallel), "bottleneck-2": self.bottlenecks(twice, normed)}
            forms["bottleneck-3"] = self.bottlenecks(rms, rms)
        return forms
