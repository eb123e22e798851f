"""The base model's weights as a decoder asks for them: one at a time, from the files, without holding a model.

Some kinds of adapters mean something only together with the weights that they were trained on (DoRA divides by their
norms, PiSSA subtracts a part of them). Those weights are read from the base's safetensors by the path of the module.
A file names its tensors as the model's modules are called in most cases; where it does not (stacked experts that it
holds one by one, names of an older version, packed numbers), the model is loaded once on the CPU for the adapter at
hand and let go afterwards.

Running example: base in `/models/llama`, file of two shards
    weights.weight("model.layers.0.self_attn.q_proj")   one tensor of 4096 x 4096 read, in float32
    weights.weight("lm_head")                           tied and absent in the file: the embedding's
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from peft_core.errors import UnsupportedAdapter
from peft_core.spec import BaseModelSpec, Site

logger = logging.getLogger(__name__)

_INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BaseFiles:
    """The weights of one base; everything it returns is float32, contiguous and the caller's own.

    Values are first rounded to the dtype that the base is served in: an adapter must fit the numbers that it meets.
    """

    def __init__(self, directory: Path, spec: BaseModelSpec, dtype: torch.dtype = torch.float32) -> None:
        self._directory = directory
        self._spec = spec
        self._dtype = dtype
        self._places: Mapping[str, Path] | None = None  # tensor name -> file
        self._model: Any = None

    def weight(self, path: str) -> torch.Tensor:
        """The weight of a module, or a stacked parameter by `<module>.<parameter>` as it is stored.

        Logical [out_features, in_features] of a linear however it is stored, [rows, width] of an embedding, [width]
        of a norm.

        Raises:
            UnsupportedAdapter: the base's weights cannot be read here.
            KeyError: the base has no such module.
        """
        if path in self._spec.expert_parameters:
            return self._read(path, self._spec.expert_parameters[path])
        site = self._spec.sites.get(path)
        if site is None:
            shape = (self._spec.norms[path].width,) if path in self._spec.norms else None
            return self._read(f"{path}.weight", shape)
        if site.kind == "head" and self._spec.tie_word_embeddings:
            return self.weight(self._tied_embedding(site))
        stored = (site.out_features, site.in_features)
        if site.kind == "embedding" or site.transposed:
            stored = (site.in_features, site.out_features)
        values = self._read(f"{path}.weight", stored)
        return values.T.contiguous() if site.transposed else values

    def bias(self, path: str) -> torch.Tensor | None:
        """The bias of a linear or a norm, None where it has none. Raises as `weight`."""
        site, norm = self._spec.sites.get(path), self._spec.norms.get(path)
        if site is not None:
            return self._read(f"{path}.bias", (site.out_features,)) if site.has_bias else None
        if norm is not None:
            return self._read(f"{path}.bias", (norm.width,)) if norm.has_bias else None
        raise KeyError(f"the base has no module {path!r} with a bias of its own")

    def release(self) -> None:
        """Lets go of the model, if one had to be loaded."""
        self._model = None

    def _tied_embedding(self, head: Site) -> str:
        wanted = (head.out_features, head.in_features)
        sites = (site for site in self._spec.sites.values() if site.kind == "embedding")
        return next(site.path for site in sites if (site.in_features, site.out_features) == wanted)

    def _read(self, name: str, shape: tuple[int, ...] | None) -> torch.Tensor:
        values = self._from_files(name, shape)
        if values is None:
            values = self._from_model(name)
        return values.to(self._dtype).to(torch.float32).contiguous()

    def _from_files(self, name: str, shape: tuple[int, ...] | None) -> torch.Tensor | None:
        """The tensor of that name, or of the name without the model's outermost module; None if the files differ."""
        places = self._find_places()
        for candidate in (name, name.partition(".")[2]):
            if candidate not in places:
                continue
            with safe_open(places[candidate], "pt") as file:
                if shape is not None and tuple(file.get_slice(candidate).get_shape()) != tuple(shape):
                    continue
                values: torch.Tensor = file.get_tensor(candidate)
            if values.dtype in _FLOAT_DTYPES:
                return values
        return None

    def _find_places(self) -> Mapping[str, Path]:
        if self._places is None:
            try:
                self._places = _places(self._directory)
            except (OSError, ValueError, KeyError) as error:
                raise _unreadable(self._directory, error) from error
        return self._places

    def _from_model(self, name: str) -> torch.Tensor:
        if self._model is None:
            self._model = _load(self._directory)
        try:
            parameter: torch.Tensor = self._model.get_parameter(name)
        except AttributeError as error:
            raise KeyError(f"the base has no parameter {name!r}") from error
        return parameter.detach().clone()


def _places(directory: Path) -> dict[str, Path]:
    """Every tensor of a model's directory and the file that holds it."""
    index = directory / _INDEX_FILE
    if index.is_file():
        return {name: directory / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM  # seconds to import, and hardly ever needed

    logger.info("an adapter needs weights that %s names otherwise; the model is loaded once for it", directory)
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _unreadable(directory, error) from error


def _unreadable(directory: Path, error: Exception) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"this kind of adapter needs the base's own weights, and they cannot be read from {directory}: "
        f"{str(error)[:300]}",
        code="base_unreadable",
    )
