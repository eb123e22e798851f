"""A pickled file of tensors, opened where it can do no harm: in a child process, with bounds on memory and time.

`torch.load(weights_only=True)` builds tensors and plain containers and nothing else; the child is there for what it
still allows, such as a small file that unpacks to terabytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from server.convert.errors import ConversionRefused

TIMEOUT_S = 600.0
MAX_MEMORY_FACTOR = 4  # of the file's size ...
MEMORY_FLOOR_BYTES = 1 << 30  # ... and this in any case


def unpickle(source: Path, destination: Path, *, timeout_s: float = TIMEOUT_S) -> int:
    """Writes the tensors of a pickled file as safetensors; how many there are.

    Raises:
        ConversionRefused: it holds something else than tensors, is damaged, or asks for too much memory or time.
    """
    room = MEMORY_FLOOR_BYTES + MAX_MEMORY_FACTOR * source.stat().st_size
    command = [sys.executable, "-m", "server.convert.pickle_child", str(source), str(destination), str(room)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ConversionRefused(f"{source.name} could not be read within {timeout_s:.0f} s and was given up.") from None
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise ConversionRefused(
            f"{source.name}: the process that read it ended with status {child.returncode} and said nothing. It "
            f"may have asked for more than the {room >> 20} MiB that a file of its size is given."
        ) from None
    if "error" in answer:
        raise ConversionRefused(f"{source.name}: {answer['error']}")
    return int(answer["num_tensors"])
