"""The child that opens a pickled file: `python -m server.convert.pickle_child SOURCE DESTINATION ROOM_BYTES`.

It prints one line of JSON: {"num_tensors": ...} or {"error": ...}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_MAX_NAME_CHARS = 512


def read_tensors(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled state dict, each in memory of its own.

    Raises:
        ValueError: it is no flat dictionary of plain tensors.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a hostile file provokes
        raise ValueError(f"it cannot be read as plain tensors ({type(error).__name__}: {_said(error)})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
    return {_checked_name(name): _plain(name, value) for name, value in content.items()}


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name or len(name) > _MAX_NAME_CHARS:
        raise ValueError(f"it holds a tensor of the name {str(name)[:80]!r}, which is none")
    return name


def _plain(name: object, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        raise ValueError(f'"{str(name)[:80]}" is no plain tensor')
    if value.is_quantized or value.is_complex():
        raise ValueError(f'"{str(name)[:80]}" is no plain tensor')
    return value.detach().clone().contiguous()


def limit_memory(room: int) -> None:
    """Bound what this process may map beyond what it has already. Where the system has no such bound, none is set."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + room
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(source: str, destination: str, room: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    limit_memory(int(room))
    try:
        tensors = read_tensors(Path(source))
        if not tensors:
            return {"error": "it holds no tensor"}
        save_file(tensors, destination, metadata={"format": "pt"})
    except ValueError as error:
        return {"error": f"{error}."}
    except (MemoryError, RuntimeError) as error:
        return {"error": f"it asks for more memory than a file of its size may ({_said(error)})."}
    return {"num_tensors": len(tensors)}


def _said(error: Exception) -> str:
    """The beginning of what an error says; some say nothing."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else "no more is known"


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
