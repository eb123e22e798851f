"""Identity of a base model: which weights, without reading all of them.

An adapter only means something on the weights that it was trained on. A fingerprint covers the configuration, every
tensor's name, shape and dtype, and the first and last 64 KiB of the data: a fine-tuned, converted or truncated copy
gets another one, at the cost of a few megabytes read. It is no defence against a forger.

Running example: two fine-tunes of one model differ in every matrix, hence in their first and last bytes
    fingerprint_of_files(Path("base")) == "sha256:5f1d..."  !=  fingerprint_of_files(Path("fine-tuned"))
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

_SAMPLE_BYTES = 64 * 1024  # from each end
_LENGTH_BYTES = 8  # of the number that opens a safetensors file
_MAX_HEADER_BYTES = 100 * 1000 * 1000  # as the safetensors library
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "_attn_implementation", "_experts_implementation"})


def fingerprint_of_files(directory: Path | str) -> str:
    """Fingerprint of a model directory: config.json and every safetensors file.

    Raises:
        FileNotFoundError: there is no config.json or no safetensors file.
        ValueError: config.json is no JSON, or a safetensors file is cut short.
    """
    folder = Path(directory)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no .safetensors file. Convert the weights to safetensors first.")
    digest = hashlib.sha256(_canonical(json.loads((folder / "config.json").read_bytes())))
    for path in weights:
        digest.update(_summary(path))
    return f"sha256:{digest.hexdigest()}"


def fingerprint_of_model(model: Any) -> str:
    """Fingerprint of a model in memory, for one that was not loaded from files. Differs from that of its files."""
    digest = hashlib.sha256(_canonical(model.config.to_dict()))
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        num_elements = _SAMPLE_BYTES // flat.element_size()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(_bytes_of(flat[:num_elements]))
        digest.update(_bytes_of(flat[-num_elements:]))
    return f"sha256:{digest.hexdigest()}"


def _canonical(config: dict[str, Any]) -> bytes:
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    return json.dumps(lasting, sort_keys=True, default=str).encode()


def _summary(path: Path) -> bytes:
    """Name, size, header and both ends of one safetensors file, hashed."""
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {num_bytes}\n".encode())
    with path.open("rb") as file:
        opening = file.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(opening, "little")
        if len(opening) < _LENGTH_BYTES or header_bytes > min(num_bytes - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is no safetensors file, or it is cut short. Download it again.")
        digest.update(opening + file.read(header_bytes))
        digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, num_bytes - _SAMPLE_BYTES), os.SEEK_SET)
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _bytes_of(values: torch.Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
