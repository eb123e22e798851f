"""Broken, contradictory and hostile files of every kind, through the loader's door.

Whatever is in a file, the answer is an image or a refusal that says what is wrong, soon; a gap in a decoder
("decoder_failed") is neither.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_core.trace import traced_spec
from server.engine.kv_probe import probe_kv_shape
from server.loader.client import LoaderClient
from server.loader.errors import AdapterRefused
from server.loader.job import PackingTarget, Prepared, PrepareJob
from server.loader.prepare import CHECK_SECONDS, Packer
from tests.kinds.zoo import KINDS, make_adapter
from tests.library.library_samples import in_a_loop
from tests.peft_core.adapter_files import shared_model, shared_spec

ENDLESS = r"(([a-z_.0-9]+)+)+!"  # tries every way to cut a path in pieces
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


@functools.cache
def target(base: Path) -> PackingTarget:
    """What a server of the shared llama packs for."""
    model = shared_model("llama")
    model.save_pretrained(base)
    kv = probe_kv_shape(model, block_size=16, max_length=64)
    spec = traced_spec(model, shared_spec("llama")).to_json()
    spec |= {"num_kv_heads": kv.num_kv_heads, "head_dim": kv.head_dim}
    return PackingTarget(spec, "float32", str(base))


@dataclass
class Sample:
    """A sound adapter of one kind, to be spoilt."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def job(self, directory: Path, change: Change) -> PrepareJob:
        config = json.loads(json.dumps(self.config))
        tensors = {name: value.clone() for name, value in self.tensors.items()}
        change(config, tensors)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "adapter_model.safetensors")
        files = {path.name: str(path) for path in directory.iterdir() if path.suffix in (".json", ".safetensors")}
        return PrepareJob(files, str(directory / "image"))


@functools.cache
def sample(kind: str, root: Path) -> Sample:
    directory = make_adapter(kind, shared_model("llama"), "llama", root / kind)
    config = json.loads((directory / "adapter_config.json").read_text())
    return Sample(config, load_file(directory / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def outcome(job: PrepareJob, root: Path) -> Prepared | AdapterRefused:
    began_s = time.process_time()
    try:
        return Packer(target(root / "base")).prepare(job)
    except AdapterRefused as refusal:
        error = refusal
    assert time.process_time() - began_s < 3 * CHECK_SECONDS
    assert (error.code != "decoder_failed", len(error.message) < 2000) == (True, True), error.message
    return error


def first(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name, value in tensors.items() if value.is_floating_point())


def spoil(tensors: dict[str, torch.Tensor], value: float) -> None:
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.view(-1)[:1].fill_(value)


def set_every_number(config: dict[str, Any], value: Any) -> None:
    for field, old in config.items():
        if isinstance(old, int | float) and not isinstance(old, bool):
            config[field] = value


CHANGES: dict[str, Change] = {
    "a tensor that belongs nowhere": lambda c, t: t.update(
        {"base_model.model.model.layers.0.nowhere.x": torch.ones(3)}
    ),
    "a tensor of another module": lambda c, t: t.update({first(t).replace("layers.0.", "layers.77."): torch.ones(3)}),
    "a tensor is missing": lambda c, t: (t.pop(first(t)), t.setdefault("left", torch.ones(1)))[0],
    "the last tensor is missing": lambda c, t: (t.popitem(), t.setdefault("left", torch.ones(1)))[0],
    "a tensor has a dimension more": lambda c, t: t.update({first(t): t[first(t)][None].contiguous()}),
    "a tensor is cut": lambda c, t: t.update({first(t): t[first(t)].flatten()[:-1].contiguous()}),
    "a tensor is empty": lambda c, t: t.update({first(t): torch.zeros(0, 7)}),
    "every tensor is empty": lambda c, t: t.update({name: torch.zeros(0, 7) for name in t}),
    "a tensor is one number": lambda c, t: t.update({first(t): torch.tensor(1.0)}),
    "a tensor is of integers": lambda c, t: t.update({first(t): torch.ones(t[first(t)].shape, dtype=torch.int64)}),
    "values are not numbers": lambda c, t: spoil(t, float("nan")),
    "values are infinite": lambda c, t: spoil(t, float("inf")),
    "numbers are absurd": lambda c, t: set_every_number(c, 10**12),
    "numbers are negative": lambda c, t: set_every_number(c, -3),
    "numbers are nought": lambda c, t: set_every_number(c, 0),
    "numbers are none": lambda c, t: set_every_number(c, float("nan")),
    "numbers are without end": lambda c, t: set_every_number(c, float("-inf")),
    "numbers are words": lambda c, t: set_every_number(c, "seven"),
    "numbers are fractions": lambda c, t: set_every_number(c, 0.3),
    "an unknown field": lambda c, t: c.update(swirl_factor=3),
    "targets of another model": lambda c, t: c.update(target_modules=["query_key_value", "dense"]),
    "targets that are no list": lambda c, t: c.update(target_modules={"q_proj": 3}),
    "every module saved as well": lambda c, t: c.update(modules_to_save=["model", "lm_head"]),
    "an unknown kind": lambda c, t: c.update(peft_type="NOVELTY"),
    "a kind that is no text": lambda c, t: c.update(peft_type=["LORA"]),
    "the kind of another file": lambda c, t: c.update(peft_type="LORA" if c["peft_type"] != "LORA" else "LOHA"),
    "for another task": lambda c, t: c.update(task_type="SEQ_2_SEQ_LM"),
    "fields that are all null": lambda c, t: c.update({name: None for name in c if name != "peft_type"}),
    "a list of lists for a list": lambda c, t: c.update(target_modules=[["q_proj"]], layers_to_transform=[[0]]),
}
MUST_REFUSE = (
    "a tensor that belongs nowhere",
    "every tensor is empty",
    "values are not numbers",
    "values are infinite",
    "an unknown field",
    "an unknown kind",
    "a kind that is no text",
    "for another task",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_adapter_is_served_or_refused_and_never_a_gap(kind: str, root: Path, tmp_path: Path) -> None:
    sound = sample(kind, root)
    assert isinstance(outcome(sound.job(tmp_path / "sound", lambda c, t: None), root), Prepared)
    for number, (name, change) in enumerate(CHANGES.items()):
        result = outcome(sound.job(tmp_path / str(number), change), root)
        if name in MUST_REFUSE:
            assert isinstance(result, AdapterRefused), f"{kind}: {name} was served"
        if isinstance(result, AdapterRefused):
            assert not (tmp_path / str(number) / "image").exists()


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_endless_expression_is_given_up(field: str, root: Path, tmp_path: Path) -> None:
    result = outcome(sample("lora", root).job(tmp_path, lambda c, t: c.update({field: ENDLESS})), root)
    assert isinstance(result, AdapterRefused)
    assert result.code == "check_timed_out"


def test_the_process_goes_on_after_an_endless_expression(root: Path, tmp_path: Path) -> None:
    @in_a_loop
    async def scene() -> None:
        loader = await LoaderClient.launch()
        try:
            await loader.aim(target(root / "base"))
            sound = sample("lora", root)
            for field in ("rank_pattern", "alpha_pattern"):
                job = sound.job(tmp_path / field, functools.partial(_plant_pattern, field))
                with pytest.raises(AdapterRefused) as refusal:
                    await loader.prepare(job)
                assert refusal.value.code == "check_timed_out"
            assert (await loader.prepare(sound.job(tmp_path / "good", lambda c, t: None))).num_bytes > 0
            assert loader.num_starts == 1
        finally:
            await loader.close()

    scene()


def _plant_pattern(field: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config[field] = {ENDLESS: 4}
