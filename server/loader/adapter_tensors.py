"""All tensors of one adapter, from whichever of its files holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from adapters_store.header import TensorEntry
from adapters_store.staging import TENSOR_FILES
from peft_core.errors import MalformedAdapter
from server.loader.tensor_file import TensorFile


class AdapterTensors:
    """A `peft_core.methods.TensorSource` over the tensor files of an adapter."""

    def __init__(self, files: Mapping[str, str]) -> None:
        """`files`: relative path in the adapter -> where the bytes lie.

        Raises:
            MalformedAdapter: there are no weights, or two files hold a tensor of one name.
            InvalidHeader, OSError: a file is unsound, or cannot be read.
        """
        self._files: dict[str, TensorFile] = {}  # by tensor name
        for name in TENSOR_FILES:
            if name in files:
                self._add(name, TensorFile(Path(files[name])))
        if not self._files:
            raise MalformedAdapter(f"there are no weights: none of {', '.join(TENSOR_FILES)} holds a tensor.")
        self.header: Mapping[str, TensorEntry] = {name: file.entry(name) for name, file in self._files.items()}

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the host, in memory of its own. Raises InvalidHeader if its file has become shorter."""
        return self._files[name].get(name)

    def entry(self, name: str) -> TensorEntry:
        return self.header[name]

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor as they are stored, in pieces. Raises as `get`."""
        return self._files[name].chunks(name)

    def _add(self, path: str, file: TensorFile) -> None:
        for name in file.header:
            if name in self._files:
                raise MalformedAdapter(f'tensor "{name}" is in {path} and in another file as well.', tensor=name)
            self._files[name] = file
