"""Which files belong to the project: those that git tracks, or, in a copy without git, those that are there."""

from __future__ import annotations

import fnmatch
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NOT_OURS = {".git", ".venv", "build", "dist", "__pycache__"}


def tracked_files(*patterns: str) -> list[str]:
    """Paths below the root, sorted, whose name matches one of the patterns; deleted ones are left out."""
    names = _known_to_git() or _on_disk()
    chosen = [name for name in names if any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in patterns)]
    return sorted(name for name in chosen if (ROOT / name).is_file())


def _known_to_git() -> list[str]:
    if not (ROOT / ".git").exists():
        return []
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in run.stdout.split("\0") if name]


def _on_disk() -> list[str]:
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path.as_posix() for path in paths if not _NOT_OURS & set(path.parts)]
