"""The base and the adapters that the benchmarks run on: random weights of a real shape, made once and kept.

Every contender loads the same files. The base has the shape of a small Qwen2 (hidden 512, 12 layers, intermediate
1536, 8 query and 2 key/value heads, vocabulary 32,000: 69 million parameters), its tokenizer says one word a token
("t17 t4 t31999"), so that a text of n words is a prompt of n tokens. Adapters are directories as PEFT saves them,
all weights random and none zero, so that they cost and change what trained ones do.

Running example, under the cache directory:
    qwen2-512x12-v32000/                                  config, weights, tokenizer
    qwen2-512x12-v32000-adapters/r16-all-7/               adapter 7 of rank 16 on all linears, as PEFT saves it
    qwen2-512x12-v32000-adapters/r16-all-7.float32.v3.img the same, packed for the engine
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bench.workloads import ALL_LINEAR, AdapterShape
from peft_core.image import PACKER_VERSION, pack, write_image
from peft_core.methods import decode
from peft_core.spec import BaseModelSpec
from peft_core.traits import traits_of
from server.engine.description import EngineDescription
from server.engine.request import AdapterTicket

EOS_TOKEN_ID = 1


@dataclass(frozen=True, slots=True)
class BaseShape:
    hidden: int = 512
    layers: int = 12
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 2
    vocab: int = 32_000
    max_position: int = 8192

    @property
    def name(self) -> str:
        return f"qwen2-{self.hidden}x{self.layers}-v{self.vocab}"

    def projections(self) -> dict[str, tuple[str, int, int]]:
        """Projection -> path within a layer, inputs, outputs."""
        wide, narrow = self.hidden, self.hidden // self.heads * self.kv_heads
        return {
            "q_proj": ("self_attn.q_proj", wide, wide),
            "k_proj": ("self_attn.k_proj", wide, narrow),
            "v_proj": ("self_attn.v_proj", wide, narrow),
            "o_proj": ("self_attn.o_proj", wide, wide),
            "gate_proj": ("mlp.gate_proj", wide, self.intermediate),
            "up_proj": ("mlp.up_proj", wide, self.intermediate),
            "down_proj": ("mlp.down_proj", self.intermediate, wide),
        }

    def adapter_parameters(self, adapter: AdapterShape) -> int:
        sizes = self.projections()
        return self.layers * sum(adapter.rank * (sizes[name][1] + sizes[name][2]) for name in adapter.targets)


STANDARD = BaseShape()
TINY = BaseShape(hidden=64, layers=2, intermediate=128, heads=4, kv_heads=2, vocab=512, max_position=8192)


class HeaderEntry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class LoadedTensors:
    """An adapter's tensors in memory, as decoders want to see them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.header: Mapping[str, HeaderEntry] = {
            name: HeaderEntry("F32", tuple(tensor.shape)) for name, tensor in tensors.items()
        }

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def base_directory(shape: BaseShape, cache: Path) -> Path:
    """The directory of the base, made at the first call."""
    directory = cache / shape.name
    if (directory / "tokenizer.json").exists():
        return directory
    config = Qwen2Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.max_position,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=3.0 * shape.hidden**-0.5)  # logits with a spread of about 3
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    _word_tokenizer(shape.vocab).save_pretrained(partial)
    partial.rename(directory)
    return directory


def adapter_directory(shape: BaseShape, adapter: AdapterShape, number: int, cache: Path) -> Path:
    """One adapter as PEFT saves it; another number is other weights."""
    directory = cache / f"{shape.name}-adapters" / f"r{adapter.rank}-{_targets_name(adapter)}-{number}"
    if (directory / "adapter_config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1000 + number)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for name in adapter.targets:
            path, inputs, outputs = shape.projections()[name]
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            down, up = (adapter.rank, inputs), (outputs, adapter.rank)
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(down, generator=generator) * inputs**-0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(up, generator=generator) * 0.1 * adapter.rank**-0.5
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shape.name,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.targets),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return directory


def ticket(directory: Path, description: EngineDescription) -> AdapterTicket:
    """What the engine needs in order to load an adapter: its image is packed at the first call."""
    path = directory.with_name(f"{directory.name}.{description.adapter_dtype}.v{PACKER_VERSION}.img")
    spec = BaseModelSpec.from_json(description.spec)
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    weights = next(file for file in directory.glob("*.safetensors"))
    decoded = decode(config, LoadedTensors(load_file(weights)), spec)
    image = pack(decoded.forms, spec, description.adapter_dtype)
    write_image(path, image)
    key = hashlib.sha256(f"{path}|{spec.fingerprint}".encode()).hexdigest()
    return AdapterTicket(key, directory.name, str(path), image.num_bytes, traits_of(decoded.forms))


def tickets(
    shape: BaseShape, adapters: tuple[AdapterShape, ...], description: EngineDescription, cache: Path
) -> list[AdapterTicket]:
    """One ticket an adapter, in order."""
    directories = [adapter_directory(shape, adapter, number, cache) for number, adapter in enumerate(adapters)]
    return [ticket(directory, description) for directory in directories]


def text_of(token_ids: list[int]) -> str:
    """The words that the base's tokenizer reads as exactly these tokens."""
    return " ".join(f"t{token}" for token in token_ids)


def _targets_name(adapter: AdapterShape) -> str:
    return "all" if adapter.targets == ALL_LINEAR else "".join(name[0] for name in adapter.targets)


def _word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = {f"t{token}": token for token in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": EOS_TOKEN_ID, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
