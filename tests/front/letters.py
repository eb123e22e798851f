"""A tokenizer whose ids are bytes: 0..255 are themselves, 298 begins a text, 299 ends it.

Together with the fake engine, which continues a prompt by successors, "A" is answered by "BCDEF...".
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS = 298, 299
TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATE += "{% if messages[0].role == 'refuse' %}{{ raise_exception('no such role') }}{% endif %}"


def letters(*, adds_bos: bool = False) -> Tokenizer:
    vocab = {character: byte for byte, character in _bytes_to_characters().items()}
    vocab.update({f"<unused{i}>": i for i in range(256, BOS)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    assert (tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")) == (BOS, EOS)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def save_letters(directory: Path, *, adds_bos: bool = False, template: str | None = TEMPLATE) -> Path:
    """A model directory as far as its tokenizer goes."""
    letters(adds_bos=adds_bos).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _bytes_to_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes, as `ByteLevel` uses them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
