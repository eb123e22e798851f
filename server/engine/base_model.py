"""Load the base model and decide whether it can be served at all.

Any `transformers` causal LM will do that computes its attention through the attention interface;
what would be served wrongly is refused here, with a sentence that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from peft_core.fingerprint import fingerprint_of_files
from peft_core.spec import BaseModelSpec
from peft_core.trace import traced_spec
from server.engine.config import EngineConfig
from server.engine.errors import EngineStartError
from server.engine.kv_cache import KVShape
from server.engine.kv_probe import probe_kv_shape

MODEL_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", "*.model"]
SERVED_LAYERS = {"full_attention", "sliding_attention", "attention"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # frequencies chosen from the longest sequence of the step
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded, plain model, and what is known of it."""

    model: Any
    directory: Path  # where its files lie
    spec: BaseModelSpec  # traced
    kv_shape: KVShape
    max_model_len: int
    eos_token_ids: tuple[int, ...]


def load_base_model(config: EngineConfig, progress: Callable[[str, float], None]) -> BaseModel:
    """Find, load and judge the base.

    Raises:
        EngineStartError: it does not exist, cannot be read, or cannot be served.
    """
    progress("find model", 0.0)
    directory = find_model(config.model, config.revision)
    with _told_as_start_error(directory):
        model_config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    text_config = model_config.get_text_config()
    refuse_unservable(text_config)
    progress("load weights", 0.0)
    transformers_logging.disable_progress_bar()  # the stages are told by `progress`
    device = _device(config)
    with _told_as_start_error(directory):
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto" if config.dtype == "auto" else DTYPES[config.dtype],
            attn_implementation="eager",
            trust_remote_code=False,
        )
    model = model.to(device).eval().requires_grad_(False)
    if not model._supports_attention_backend:
        raise EngineStartError(_no_attention_interface(text_config.model_type))
    progress("trace", 0.0)
    spec = BaseModelSpec.from_model(model, fingerprint_of_files(directory), name=config.name or config.model)
    max_length = max_model_len(text_config, config.max_model_len)
    kv_shape = probe_kv_shape(model, config.block_size, max_length)
    spec = replace(traced_spec(model, spec), num_kv_heads=kv_shape.num_kv_heads, head_dim=kv_shape.head_dim)
    return BaseModel(
        model,
        directory,
        spec,
        kv_shape,
        max_length,
        _eos_token_ids(directory, text_config),
    )


@contextmanager
def _told_as_start_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise EngineStartError(f"the model in {directory} cannot be read: {error}") from error


def refuse_unservable(text_config: Any) -> None:
    """Refuse architectures whose state is not K/V of plain causal attention.

    Raises:
        EngineStartError: names what is not served.
    """
    kinds = set(getattr(text_config, "layer_types", None) or ()) - SERVED_LAYERS
    if kinds:
        raise EngineStartError(
            f"{text_config.model_type} has layers of kind {', '.join(sorted(kinds))}; served are "
            f"{', '.join(sorted(SERVED_LAYERS))}. Choose a model whose layers are all plain or sliding attention."
        )
    if getattr(text_config, "is_encoder_decoder", False):
        raise EngineStartError(f"{text_config.model_type} is an encoder-decoder; only decoder-only models are served.")


def max_model_len(text_config: Any, asked: int | None) -> int:
    """Tokens of prompt and answer together.

    RoPE types whose frequencies depend on the longest sequence of the step are capped at their
    original length: below it a neighbour cannot change them.

    Raises:
        EngineStartError: more was asked than the model can do.
    """
    bound = getattr(text_config, "max_position_embeddings", None)
    reason = "max_position_embeddings"
    for parameters in rope_parameters(text_config):
        if parameters.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            bound = _original_length(text_config, parameters)
            reason = f"its {parameters['rope_type']} RoPE below which one request cannot change another's answer"
    if asked is None:
        if bound is None:
            raise EngineStartError("the model does not say how long a sequence may be. Give --max-model-len.")
        return int(bound)
    if bound is not None and asked > bound:
        raise EngineStartError(f"--max-model-len {asked} is more than {bound}, {reason}. Give {bound} or less.")
    return asked


def rope_parameters(text_config: Any) -> Iterator[Mapping[str, Any]]:
    """Every set of RoPE parameters of the config: one, or one for each kind of layer."""
    given = getattr(text_config, "rope_parameters", None) or {}
    if "rope_type" in given:
        yield given
        return
    yield from (value for value in given.values() if isinstance(value, Mapping))


def _original_length(text_config: Any, parameters: Mapping[str, Any]) -> int:
    own = getattr(text_config, "original_max_position_embeddings", None)
    length = parameters.get("original_max_position_embeddings") or own or text_config.max_position_embeddings
    return int(length)


def find_model(model: str, revision: str | None = None) -> Path:
    """The directory of a model that is one, or is downloaded into one. Raises EngineStartError."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=MODEL_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EngineStartError(
            f"{model} is neither a directory here nor a model that the hub gives out: {error}"
        ) from error


def _device(config: EngineConfig) -> torch.device:
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _eos_token_ids(directory: Path, text_config: Any) -> tuple[int, ...]:
    """Those that the model can say: some configurations name tokens outside of the vocabulary, or -1 for none."""
    given = getattr(text_config, "eos_token_id", None)
    if (directory / "generation_config.json").exists():
        own = GenerationConfig.from_pretrained(directory).eos_token_id
        given = given if own is None else own
    ids = given if isinstance(given, list | tuple) else [given]
    return tuple(token for token in ids if token is not None and 0 <= token < text_config.vocab_size)


def _no_attention_interface(model_type: str) -> str:
    return (
        f"{model_type} does not compute its attention through transformers' attention interface, so paged attention "
        "would never be called and answers would be wrong without an error. Choose a model that supports it "
        "(Llama, Qwen, Mistral, Gemma, Phi, GPT-2, OPT, GPT-NeoX, OLMo and many more)."
    )
