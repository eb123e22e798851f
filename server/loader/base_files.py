"""A base model seen through its files alone: its modules and its weights, without computing anything."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from peft_core.fingerprint import fingerprint_of_files
from peft_core.spec import BaseModelSpec
from server.loader.base_weights import BaseFiles


class BaseOnDisk(NamedTuple):
    spec: BaseModelSpec  # not traced
    weights: BaseFiles

    @classmethod
    def open(cls, directory: Path) -> BaseOnDisk:
        """Describes the model in a directory; its weights are read when they are asked for.

        Raises:
            OSError, ValueError: there is no model, or one that `transformers` does not know.
        """
        from transformers import AutoConfig, AutoModelForCausalLM  # seconds to import

        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        spec = BaseModelSpec.from_model(model, fingerprint_of_files(directory))
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        return cls(spec, BaseFiles(directory, spec, dtype))
