"""The tree that ARCHITECTURE.md draws, read back as paths.

One name a line, two spaces of indentation a level, a folder ends in `/`, at least two spaces before the remark:

    server/            the product
      engine/          one loop
        request.py     what a caller asks for
    -> server/, server/engine/, server/engine/request.py
"""

from __future__ import annotations

import re

_TREE = re.compile(r"<!-- tree -->\n+```text\n(.*?)```", re.DOTALL)
_LINE = re.compile(r"^( *)(\S+)(?: {2,}\S.*)?$")
INDENT = 2


def drawn_paths(markdown: str) -> list[str]:
    """The paths of the tree behind `<!-- tree -->`, in the order drawn; folders keep their final `/`.

    Raises:
        ValueError: there is no tree, or a line that cannot be read.
    """
    tree = _TREE.search(markdown)
    if tree is None:
        raise ValueError("no <!-- tree --> with a text block behind it")
    paths: list[str] = []
    open_folders: list[str] = []
    for line in tree[1].splitlines():
        match = _LINE.match(line)
        if match is None or len(match[1]) % INDENT or len(match[1]) // INDENT > len(open_folders):
            raise ValueError(f"cannot read the line {line!r} of the tree")
        del open_folders[len(match[1]) // INDENT :]
        path = "".join(open_folders) + match[2]
        paths.append(path)
        if match[2].endswith("/"):
            open_folders.append(match[2])
    return paths


def undrawn(tracked: list[str], drawn: list[str]) -> list[str]:
    """Tracked files that the tree leaves out: neither drawn nor below a folder drawn without contents."""
    closed = [path for path in drawn if path.endswith("/") and not _is_opened(path, drawn)]
    return [path for path in tracked if path not in drawn and not any(path.startswith(folder) for folder in closed)]


def _is_opened(folder: str, drawn: list[str]) -> bool:
    return any(path.startswith(folder) and path != folder for path in drawn)
