"""A converted directory does what its source did, and what cannot be converted is refused with nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.convert.conversion import convert
from server.convert.errors import ConversionRefused
from tests.adapterhub_goldens import DIRECTORY as HUB_GOLDENS
from tests.kinds.zoo import make_adapter
from tests.peft_core.adapter_files import logits_of, relative_error
from tests.tiny_models import HIDDEN, attention_targets, load_oracle, make_lora, make_model, random_prompt

PROMPT = random_prompt(24)
LAYER = "model.layers.1"


def as_pickle(directory: Path) -> dict[str, torch.Tensor]:
    """Turns the weights of a PEFT directory into a pickle; returns them."""
    tensors = load_file(directory / "adapter_model.safetensors")
    torch.save(tensors, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    return tensors


def mlx_adapter(directory: Path, *, scale: float = 3.0, **fields: Any) -> dict[str, torch.Tensor]:
    """A low-rank addition to two modules of the llama, as MLX writes it; returns path -> W's change, [out, in]."""
    generator = torch.Generator().manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    changes: dict[str, torch.Tensor] = {}
    for path, rank, out in ((f"{LAYER}.self_attn.q_proj", 4, HIDDEN), (f"{LAYER}.mlp.up_proj", 2, 128)):
        down = torch.randn(HIDDEN, rank, generator=generator) / 8
        up = torch.randn(rank, out, generator=generator) / 8
        tensors |= {f"{path}.lora_a": down, f"{path}.lora_b": up}
        changes[path] = scale * (down @ up).T
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0},
        "model": "org/llama",
        **fields,
    }
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapters.safetensors")
    return changes


def logits_of_adapter(model: Any, directory: Path) -> torch.Tensor:
    return logits_of(load_oracle(model, directory), PROMPT)


def test_a_pickled_adapter_of_peft_comes_out_exactly(tmp_path: Path) -> None:
    make_lora(make_model("llama"), tmp_path / "src", targets=attention_targets("llama"))
    (tmp_path / "src" / "training_args.bin").write_bytes(b"\x80not for the server")
    tensors = as_pickle(tmp_path / "src")
    done = convert(tmp_path / "src", tmp_path / "dst")
    assert "without running its code" in done.steps[0]
    loaded = load_file(tmp_path / "dst" / "adapter_model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_a_pickled_adapter_of_adapterhub_keeps_its_names_and_its_head(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    (source / "adapter_config.json").write_text('{"config": {}, "model_type": "llama", "version": "adapters.1.3.0"}')
    (source / "head_config.json").write_text("{}")
    torch.save({"model.layers.0.x.adapters.poet.y": torch.ones(2)}, source / "pytorch_adapter.bin")
    torch.save({"lm_head.weight": torch.ones(3, 2)}, source / "pytorch_model_head.bin")
    convert(source, tmp_path / "dst")
    assert list(load_file(tmp_path / "dst" / "adapter.safetensors")) == ["model.layers.0.x.adapters.poet.y"]
    assert list(load_file(tmp_path / "dst" / "model_head.safetensors")) == ["lm_head.weight"]
    assert (tmp_path / "dst" / "head_config.json").exists()


def test_an_mlx_adapter_adds_what_mlx_adds(tmp_path: Path) -> None:
    model = make_model("llama", seed=3)
    changes = mlx_adapter(tmp_path / "src")
    done = convert(tmp_path / "src", tmp_path / "dst")
    assert "MLX" in done.steps[0]
    config = json.loads((tmp_path / "dst" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/llama"
    converted = logits_of_adapter(model, tmp_path / "dst")
    plain = logits_of(model, PROMPT)
    with torch.no_grad():
        for path, change in changes.items():
            model.get_submodule(path).weight.add_(change)
    assert relative_error(converted, logits_of(model, PROMPT)) < 1e-5
    assert relative_error(converted, plain) > 1e-2


def test_the_scale_of_mlx_is_twenty_where_nothing_says_otherwise(tmp_path: Path) -> None:
    mlx_adapter(tmp_path / "src", lora_parameters={"rank": 4})
    convert(tmp_path / "src", tmp_path / "dst")
    config = json.loads((tmp_path / "dst" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 20 * config["r"]
    assert list(config["alpha_pattern"].values()) == [40.0] if config["r"] == 4 else [80.0]


def test_a_dora_of_mlx_is_a_dora_of_peft(tmp_path: Path) -> None:
    model = make_model("llama", seed=3)
    changes = mlx_adapter(tmp_path / "src", fine_tune_type="dora")
    tensors = load_file(tmp_path / "src" / "adapters.safetensors")
    for path in changes:
        norm = model.get_submodule(path).weight.detach().norm(dim=1)
        tensors[f"{path}.m"] = norm * torch.linspace(0.5, 1.5, len(norm))
    save_file(tensors, tmp_path / "src" / "adapters.safetensors")
    convert(tmp_path / "src", tmp_path / "dst")
    converted = logits_of_adapter(model, tmp_path / "dst")
    with torch.no_grad():
        for path, change in changes.items():
            weight = model.get_submodule(path).weight
            weight.add_(change)
            weight.mul_((tensors[f"{path}.m"] / weight.norm(dim=1))[:, None])
    assert relative_error(converted, logits_of(model, PROMPT)) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changed_the_base_becomes_lora_of_twice_the_rank(tmp_path: Path, start: str) -> None:
    model = make_model("llama", seed=3)
    model.save_pretrained(tmp_path / "base")
    make_lora(model, tmp_path / "src", targets=["q_proj", "down_proj"], init_lora_weights=start)
    done = convert(tmp_path / "src", tmp_path / "dst", tmp_path / "base")
    assert "rank 8" in done.steps[-1]
    config = json.loads((tmp_path / "dst" / "adapter_config.json").read_text())
    assert (config["r"], "init_lora_weights" in config) == (8, False)
    expected = logits_of_adapter(model, tmp_path / "src")
    assert relative_error(logits_of_adapter(model, tmp_path / "dst"), expected) < 1e-5
    assert relative_error(logits_of(model, PROMPT), expected) > 1e-2


def test_a_plain_lora_stays_as_it_is_with_and_without_a_base(tmp_path: Path) -> None:
    model = make_model("llama", seed=3)
    model.save_pretrained(tmp_path / "base")
    source = make_lora(model, tmp_path / "src", targets=["q_proj"])
    assert "nothing in them needs converting" in convert(source, tmp_path / "one").steps[0]
    assert "was not needed" in convert(source, tmp_path / "two", tmp_path / "base").steps[-1]
    for name in ("one", "two"):
        weights = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        assert weights == (source / "adapter_model.safetensors").read_bytes()


def test_the_only_adapter_of_a_folder_is_found(tmp_path: Path) -> None:
    make_lora(make_model("llama"), tmp_path / "src" / "poet", targets=["q_proj"])
    convert(tmp_path / "src", tmp_path / "dst")
    assert (tmp_path / "dst" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "adapter_config.json is missing"),
        ({"lora.gguf": b"GGUF"}, "GGUF is not converted"),
        ({"adapter_config.json": b"{}"}, "holds no weights"),
        ({"adapter_config.json": b'{"fine_tune_type": "lora"}'}, "adapters.safetensors is missing"),
        ({"adapter_config.json": b'{"fine_tune_type": "full"}', "adapters.safetensors": None}, "a whole model"),
        ({"adapter_config.json": b'{"lora_parameters": {"scale": "x"}}', "adapters.safetensors": None}, "no number"),
        ({"adapter_config.json": b'{"lora_parameters": {}}', "adapters.safetensors": None}, "not a part"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"junk"}, "adapter_model.bin"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(
    tmp_path: Path, files: dict[str, bytes | None], words: str
) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for name, data in files.items():
        if data is None:
            save_file({"a.weight": torch.ones(2)}, source / name)
        else:
            (source / name).write_bytes(data)
    with pytest.raises(ConversionRefused, match=re.escape(words)):
        convert(source, tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(f"{LAYER}.mlp.up_proj.lora_b"), "lacks lora_b"),
        (lambda tensors: tensors.update({"x.lora_a": torch.ones(2, 4, 3), "x.lora_b": torch.ones(2, 4, 3)}), "expert"),
        (lambda tensors: tensors.update({"x.lora_a": torch.ones(4, 3), "x.lora_b": torch.ones(4, 3)}), "[4, 3]"),
        (lambda tensors: tensors.update({"x.m": torch.ones(4)}), "not a part"),
    ],
)
def test_an_unsound_mlx_adapter_is_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    mlx_adapter(tmp_path / "src")
    tensors = load_file(tmp_path / "src" / "adapters.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "src" / "adapters.safetensors")
    with pytest.raises(ConversionRefused, match=re.escape(words)):
        convert(tmp_path / "src", tmp_path / "dst")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = make_lora(make_model("llama"), tmp_path / "src", targets=["q_proj"])
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("precious")
    with pytest.raises(ConversionRefused, match="exists already"):
        convert(source, tmp_path / "dst")
    with pytest.raises(ConversionRefused, match="no directory"):
        convert(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(ConversionRefused, match="GGUF"):
        convert(tmp_path / "x.gguf", tmp_path / "new")


@pytest.mark.parametrize("kind", ["ia3", "oft", "prompt", "fourierft"])
def test_what_no_lora_equals_is_refused_with_a_base_and_kept_without(tmp_path: Path, kind: str) -> None:
    model = make_model("llama", seed=3)
    model.save_pretrained(tmp_path / "base")
    source = make_adapter(kind, model, "llama", tmp_path / "src")
    with pytest.raises(ConversionRefused, match="without --base"):
        convert(source, tmp_path / "dst", tmp_path / "base")
    convert(source, tmp_path / "dst")
    weights = (tmp_path / "dst" / "adapter_model.safetensors").read_bytes()
    assert weights == (source / "adapter_model.safetensors").read_bytes()


def test_a_lora_of_adapterhub_becomes_one_of_peft_and_its_untrained_head_stays_behind(tmp_path: Path) -> None:
    shutil.copytree(HUB_GOLDENS / "qwen2" / "lora", tmp_path / "src")
    base = HUB_GOLDENS / "qwen2" / "base"
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    save_file({"lm_head.weight": head}, tmp_path / "src" / "model_head.safetensors")
    (tmp_path / "src" / "head_config.json").write_text("{}")
    convert(tmp_path / "src", tmp_path / "dst", base)
    assert {path.name for path in (tmp_path / "dst").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert "was not needed" in convert(tmp_path / "dst", tmp_path / "again", base).steps[-1]


@pytest.mark.parametrize("kind", ["hra", "loha"])
def test_other_kinds_that_are_low_rank_become_lora_too(tmp_path: Path, kind: str) -> None:
    model = make_model("llama", seed=3)
    model.save_pretrained(tmp_path / "base")
    source = make_adapter(kind, model, "llama", tmp_path / "src")
    expected = logits_of_adapter(model, source)
    convert(source, tmp_path / "dst", tmp_path / "base")
    assert json.loads((tmp_path / "dst" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert relative_error(logits_of_adapter(model, tmp_path / "dst"), expected) < 1e-5
