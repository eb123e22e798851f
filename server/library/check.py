"""What the front checks of an upload before the loader sees it: cheap, without torch, trusting nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapters_store.errors import InvalidHeader
from adapters_store.header import read_header
from adapters_store.record import StoredFile
from adapters_store.staging import CONFIG_FILE, HUB_WEIGHTS_FILE, WEIGHTS_FILE, Stage
from server.loader.errors import AdapterRefused


def check_files(stage: Stage) -> None:
    """Whether a stage holds an adapter whose weights' header is sound. Reads headers only.

    Raises:
        AdapterRefused: a file is missing.
        InvalidHeader: the weights are no sound safetensors file (the tensor is named).
    """
    present = {file.path for file in stage.files}
    weights = [path for path in (WEIGHTS_FILE, HUB_WEIGHTS_FILE) if path in present]
    if CONFIG_FILE not in present or not weights:
        missing = WEIGHTS_FILE if CONFIG_FILE in present else CONFIG_FILE
        raise AdapterRefused(
            f"{missing} is missing. An adapter is {CONFIG_FILE} and {WEIGHTS_FILE}, as `save_pretrained` of PEFT "
            f"writes them, or {HUB_WEIGHTS_FILE} as AdapterHub does.",
            code="missing_file",
        )
    if len(weights) > 1:
        raise AdapterRefused(
            f"there are {' and '.join(weights)}, and which of them is the adapter cannot be known. Remove one.",
            code="ambiguous_files",
        )
    for path in sorted(present):
        if path.endswith(".safetensors"):
            _check_header(stage, path)


def _check_header(stage: Stage, path: str) -> None:
    try:
        read_header(stage.path_of(path))
    except InvalidHeader as error:
        raise InvalidHeader(f"{path}: {error}", error.tensor) from error


def are_intact(places: Mapping[str, Path], files: Iterable[StoredFile]) -> bool:
    """Whether stored files still are what they were when they were committed. Reads them whole."""
    for stored in files:
        with places[stored.path].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != stored.sha256:
                return False
    return True


def check_rank(report: Mapping[str, Any], max_rank: int | None) -> None:
    """Raises AdapterRefused if an adapter is of a higher rank than the operator allows."""
    rank = max(report["ranks"], default=0)
    if max_rank is not None and rank > max_rank:
        raise AdapterRefused(
            f"the adapter has rank {rank}; this server was started with a limit of {max_rank}. Train a smaller "
            "adapter, or raise or drop --max-lora-rank.",
            code="rank_too_large",
        )
