"""Write the goldens of AdapterHub: `make goldens`.

    adapterhub/<base>/base/                  a tiny random base, as transformers 4 saves it
    adapterhub/<base>/<adapter>/             adapter_config.json as `adapters` writes it, and adapter.safetensors
    adapterhub/<base>/logits.safetensors     <adapter> -> [tokens, vocabulary] of the library: the last rows of prompt
                                             and answer
    adapterhub/goldens.json                  versions; of each base and adapter: the prompt and the greedy answer
    adapterhub/refused/<adapter>/            adapters that the library runs and that are not served
    adapterhub/as_written/                   qwen2's seq_bn exactly as the library writes it: pickles, with the head

The library writes pickles (with `use_safetensors` it fails where tensors are shared), so what it wrote is stored again
as safetensors, with the same names. Every expectation comes from a fresh model that has loaded what is on disk. It
runs without a cache, because the library's cached generation is broken for Llama and Mistral, and with eager
attention, because under any other its prefixes are masked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
from adapterhub_bases import SHAPES, VOCAB, make_base  # type: ignore[import-not-found]
from adapterhub_configs import configs, refused_configs  # type: ignore[import-not-found]
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

PROMPT_LENGTH = 14  # tokens; with the answer longer than the bases' windows
ANSWER_LENGTH = 8
NUM_ROWS = 12  # of logits that are kept
NAME = "goldens"  # of every adapter; it is part of the tensors' names


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the goldens of AdapterHub.")
    parser.add_argument("directory", type=Path)
    whole: Path = parser.parse_args().directory.resolve()
    os.chdir(whole.parent)  # the library writes the path of the base into the configs
    directory = Path(whole.name)
    shutil.rmtree(directory, ignore_errors=True)
    torch.set_num_threads(1)
    bases: dict[str, Any] = {}
    for number, base in enumerate(SHAPES):
        bases[base] = write_base(base, directory / base, seed=100 * number)
    for number, (name, config) in enumerate(refused_configs().items()):
        write_adapter(directory / "llama" / "base", directory / "refused" / name, config, seed=9000 + number)
    packages = ("adapters", "transformers", "torch", "safetensors")
    versions = {package: version(package) for package in packages} | {"python": platform.python_version()}
    text = json.dumps({"versions": versions, "adapter_name": NAME, "bases": bases}, indent=1)
    (directory / "goldens.json").write_text(text + "\n")


def write_base(base: str, directory: Path, seed: int) -> dict[str, Any]:
    """One base with all its adapters and expectations; returns prompts and answers by adapter ("base": none)."""
    make_base(base, seed).save_pretrained(directory / "base")
    logits: dict[str, torch.Tensor] = {}
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed + 1)
    for number, (name, config) in enumerate({"base": None, **configs(base)}.items()):
        prompt = torch.randint(2, VOCAB, (PROMPT_LENGTH,), generator=generator).tolist()
        if config is not None:
            filled = write_adapter(directory / "base", directory / name, config, seed + 2 + number)
            if (base, name) == ("qwen2", "seq_bn"):
                filled.save_adapter(str(directory.parent / "as_written"), NAME)
        model = load(directory / "base", None if config is None else directory / name)
        logits[name], answer = greedy(model, prompt)
        found[name] = {"prompt": prompt, "answer": answer}
        print(base, name, answer, f"spread {logits[name].std():.2f}")
    save_file(logits, directory / "logits.safetensors")
    return found


def write_adapter(base: Path, directory: Path, config: Any, seed: int) -> Any:
    """Add an adapter to a base, fill it with random weights, and store what the library writes; returns the model."""
    model = load_base(base)
    adapters.init(model)
    torch.manual_seed(seed)  # for what an adapter does not train
    model.add_adapter(NAME, config=config)
    fill(model, torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as written:
        model.save_adapter(written, NAME, with_head=False)
        directory.mkdir(parents=True)
        shutil.copy(Path(written) / "adapter_config.json", directory)
        tensors = torch.load(Path(written) / "pytorch_adapter.bin", weights_only=True)
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, directory / "adapter.safetensors", metadata={"format": "pt"})
    return model


def load_base(base: Path) -> Any:
    factory: Any = AutoModelForCausalLM
    return factory.from_pretrained(base, attn_implementation="eager", torch_dtype=torch.float32).eval()


def load(base: Path, adapter: Path | None) -> Any:
    """The library's own reading of what is on disk."""
    model = load_base(base)
    if adapter is None:
        return model
    adapters.init(model)
    found: dict[str, Any] = {}
    model.load_adapter(str(adapter), set_active=True, use_safetensors=True, with_head=False, loading_info=found)
    assert not found["missing_keys"], found
    return model.eval()


@torch.no_grad()
def fill(model: Any, generator: torch.Generator) -> None:
    """Random weights for everything an adapter trains (and for the frozen matrices of VeRA)."""
    marks = ("adapters.", "loras.", "refts.", "prefix_tunings.", "prefix_gates.", "shared_parameters.")
    for name, parameter in model.named_parameters():
        if f".{NAME}." not in name or not any(mark in name for mark in marks):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(drawn(name, parameter, noise))


def drawn(name: str, parameter: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith((".m.weight", ".scaling")) or ("norm_" in name and name.endswith("weight")):
        return parameter * (1 + 0.3 * noise)
    if name.endswith("lora_B"):
        is_ia3 = parameter.shape[-1] == 1
        return 1 + 0.4 * noise if is_ia3 else 0.3 * noise / math.sqrt(parameter.shape[-1])
    if parameter.dim() == 1 and not name.endswith("control_trans"):
        return 0.2 * noise
    if "phm_rule" in name or ".wte." in name or parameter.dim() == 1:
        return noise
    return noise / math.sqrt(parameter.shape[-1])


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    """The last rows of logits over prompt and answer, and the answer; every step is a whole forward pass."""
    tokens = list(prompt)
    for _ in range(ANSWER_LENGTH):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -NUM_ROWS:].float().clone()
    return logits, tokens[len(prompt) :]


if __name__ == "__main__":
    main()
