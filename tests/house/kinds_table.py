"""The tables of KINDS.md, made from the code: `python -m tests.house.kinds_table` writes them.

Each adapter of the zoo is written by its own library, decoded and packed as the loader does it, on a small llama of
ordinary proportions; what it becomes, what it takes and what a token pays is read off. Then every architecture is
asked, by names and shapes alone, whether it takes it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from peft_core.errors import AdapterError
from peft_core.forms import AdapterForms, SiteChange
from peft_core.image import pack
from peft_core.methods import SERVED_KINDS, check, decode
from peft_core.methods.kinds import ADAPTERHUB, REFUSED_KINDS, refuse_kind
from peft_core.spec import BaseModelSpec
from peft_core.trace import traced_spec
from server.engine.kv_probe import probe_kv_shape
from server.loader.adapter_tensors import AdapterTensors
from server.loader.base_weights import BaseFiles
from server.loader.prepare import read_config
from tests.adapterhub_goldens import DIRECTORY as HUB_GOLDENS
from tests.adapterhub_goldens import golden_model
from tests.house.tracked import ROOT
from tests.kinds.test_every_kind import ARCHITECTURES
from tests.kinds.zoo import ABSENT, KINDS, make_adapter
from tests.tiny_models import SERVED_ARCHITECTURES, make_model

PAGE = ROOT / "KINDS.md"
REFERENCE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
UNMOVED = ("rslora", "lora-bias")  # rows that would say what the row of LoRA says


@dataclass(frozen=True, slots=True)
class Base:
    """One model, on disk and described."""

    arch: str
    model: PreTrainedModel
    spec: BaseModelSpec
    weights: BaseFiles

    @classmethod
    def make(cls, arch: str, directory: Path, **shape: int) -> Base:
        """A random model of an architecture."""
        return cls.of(make_model(arch, seed=1, **shape), arch, directory)

    @classmethod
    def of(cls, model: PreTrainedModel, arch: str, directory: Path) -> Base:
        model.save_pretrained(directory)
        kv = probe_kv_shape(model, block_size=16, max_length=64)
        spec = traced_spec(model, BaseModelSpec.from_model(model, "reference"))
        spec = replace(spec, num_kv_heads=kv.num_kv_heads, head_dim=kv.head_dim)
        return cls(arch, model, spec, BaseFiles(directory, spec))

    @property
    def multiply_adds(self) -> int:
        """Of its linears, a token."""
        return sum(site.in_features * site.out_features for site in self.spec.sites.values() if site.kind == "linear")


class Row(NamedTuple):
    """One line of a table, as text."""

    name: str
    peft_type: str
    becomes: str
    reads_base: str
    size: str
    cost: str


def row_of(name: str, directory: Path, base: Base) -> Row:
    """What one adapter becomes on a base. Raises AdapterError."""
    config = read_config(directory / "adapter_config.json")
    tensors = AdapterTensors({path.name: str(path) for path in directory.iterdir()})
    forms, report = decode(config, tensors, base.spec, base.weights)
    ranks = f" (rank {', '.join(map(str, report.ranks))})" if report.ranks else ""
    becomes = ", ".join(form + ranks if form == "low rank" else form for form in report.forms)
    share = multiply_adds(forms, base) / base.multiply_adds
    kibibytes = pack(forms, base.spec, "bfloat16").num_bytes / 1024
    return Row(name, report.kind, becomes, "yes" if report.needs_base else "", f"{kibibytes:,.0f}", f"{share:.1%}")


def multiply_adds(forms: AdapterForms, base: Base) -> int:
    """What a token pays beside the base; a token that attends to a prefix pays for its keys and values."""
    total = sum(delta.down.numel() + delta.up.numel() for delta in forms.linear.values())
    total += sum(delta.up[0].numel() + delta.down[0].numel() for delta in forms.experts.values())
    total += sum(_of_change(change) for change in forms.changes.values())
    total += sum(0 if change.up is None else change.up.numel() for change in forms.embeddings.values())
    num_tokens = 0
    if forms.prefix is not None:
        num_tokens = forms.prefix.num_tokens
    elif forms.virtual is not None:
        num_tokens = forms.virtual.num_tokens
    return total + 2 * num_tokens * base.spec.hidden_size * base.spec.num_layers


def _of_change(change: SiteChange) -> int:
    vectors = (change.gain, change.shift, change.input_gain, change.cos, change.sin)
    parts = (*vectors, change.rotation, change.dense, change.replacement)
    total = sum(part.numel() for part in parts if part is not None)
    if change.kron_left is not None and change.kron_right is not None:  # rows of x as a matrix, from both sides
        total += change.kron_left.numel() * change.kron_right.shape[1]
        total += change.kron_left.shape[0] * change.kron_right.numel()
    return total


def peft_rows(base: Base, work: Path, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Row]:
    for name in kinds:
        if name in UNMOVED:
            continue
        directory = make_adapter(name, base.model, base.arch, work / name)
        try:
            yield row_of(name, directory, base)
        except AdapterError as error:
            config = read_config(directory / "adapter_config.json")
            yield Row(name, str(config["peft_type"]), f"refused: {error.message}", "", "", "")


def hub_rows(work: Path) -> Iterator[Row]:
    base = Base.of(golden_model("llama"), "llama", work / "hub-base")
    for directory in sorted((HUB_GOLDENS / "llama").iterdir()):
        if (directory / "adapter_config.json").exists():
            try:
                yield row_of(directory.name, directory, base)
            except AdapterError as error:
                yield Row(directory.name, ADAPTERHUB, f"refused: {error.message}", "", "", "")


def refused_rows() -> Iterator[tuple[str, str]]:
    """`peft_type` and the sentence that it is refused with."""
    for kind in sorted(REFUSED_KINDS - set(SERVED_KINDS)):
        try:
            refuse_kind(kind, ())
        except AdapterError as error:
            sentence = error.message.partition(": ")[2].partition(" Served kinds")[0]
            yield kind, sentence[0].upper() + sentence[1:]


def refusals_by_architecture(work: Path) -> dict[str, list[str]]:
    """Kind -> architectures on which its own library writes it and we refuse it."""
    refused: dict[str, list[str]] = {}
    for arch in SERVED_ARCHITECTURES:
        base = Base.make(arch, work / arch)
        for name in KINDS:
            if name in ABSENT.get(arch, ()):
                continue
            directory = make_adapter(name, base.model, arch, work / arch / name)
            try:
                tensors = AdapterTensors({path.name: str(path) for path in directory.iterdir()})
                check(read_config(directory / "adapter_config.json"), tensors.header, base.spec)
            except AdapterError:
                refused.setdefault(name, []).append(arch)
    return refused


def gaps(refused: dict[str, list[str]]) -> str:
    """What the page says of `refusals_by_architecture`."""
    rows = [(name, ", ".join(architectures)) for name, architectures in sorted(refused.items())]
    return table(("kind", "refused on"), rows) if rows else "None: what a library can write, is served."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) + "."


def unwritten_kinds(written: set[str]) -> list[str]:
    """Kinds that are served and that no library of today writes, or not on this base."""
    return sorted(set(SERVED_KINDS) - written - {ADAPTERHUB})


HEAD = ("kind", "`peft_type`", "becomes", "reads the base", "KiB", "a token pays")


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with other texts between its marks."""
    for name, text in parts.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found = place.search(page)
        assert found is not None, f"KINDS.md must have one <!-- {name} --> ... <!-- /{name} -->"
        page = f"{page[: found.start()]}{found[1]}\n{text}\n\n{found[2]}{page[found.end() :]}"
    return page


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        peft = list(peft_rows(Base.make("llama", work / "reference", **REFERENCE), work / "peft"))
        hub = [(row.name, row.becomes, row.reads_base) for row in hub_rows(work)]
        refused = refusals_by_architecture(work)
    parts = {
        "kinds": table(HEAD, [(row.name, f"`{row.peft_type}`", *row[2:]) for row in peft]),
        "adapterhub": table(("method", "becomes", "reads the base"), hub),
        "gaps": gaps(refused),
        "architectures": listed(ARCHITECTURES),
        "more": listed([f"`{kind}`" for kind in unwritten_kinds({row.peft_type for row in peft})]),
        "refused": table(("`peft_type`", "why"), [(f"`{kind}`", why) for kind, why in refused_rows()]),
    }
    PAGE.write_text(filled(PAGE.read_text(), parts))
    print(f"wrote {PAGE.name}: {len(peft)} kinds of PEFT, {len(hub)} of AdapterHub", file=sys.stderr)


if __name__ == "__main__":
    main()
