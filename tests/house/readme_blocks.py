"""The code blocks of a Markdown text, and how each says that it is to be run.

A comment before a `sh` or `python` block, invisible to readers, names the way:

    <!-- run: as is -->      executed in an empty folder
    <!-- run: served -->     executed while a server answers; its address replaces the one in the text
    <!-- run: targets -->    `make` commands: each target exists, and make knows how to reach it
    <!-- run: flags -->      `veneer serve` commands: each is read by the real parser, nothing starts

Running example:
    "<!-- run: served -->\n```sh\ncurl localhost:8000/health\n```\n"
    -> [Block(line=2, language="sh", text="curl localhost:8000/health\n", way="served")]
"""

from __future__ import annotations

import re
from typing import NamedTuple

WAYS = ("as is", "served", "targets", "flags")
EXECUTABLE = ("sh", "bash", "shell", "console", "python", "py")
_FENCE = re.compile(r"^```(\w*)\s*$")
_WAY = re.compile(r"^<!-- run: (.+?) -->$")


class Block(NamedTuple):
    line: int  # of the opening fence
    language: str
    text: str
    way: str | None  # None: no comment stands before it


def blocks_of(markdown: str) -> list[Block]:
    """All fenced blocks in order.

    Raises:
        ValueError: a fence that is never closed.
    """
    found: list[Block] = []
    way: str | None = None
    body: list[str] | None = None
    start, language = 0, ""
    for number, line in enumerate(markdown.splitlines(), 1):
        fence = _FENCE.match(line)
        if body is not None and line.strip() == "```":
            found.append(Block(start, language, "".join(body), way))
            body, way = None, None
        elif body is not None:
            body.append(line + "\n")
        elif fence:
            start, language, body = number, fence[1], []
        elif line.strip():
            match = _WAY.match(line.strip())
            way = match[1] if match else None
    if body is not None:
        raise ValueError(f"the block that opens in line {start} is never closed")
    return found


def unaccounted(blocks: list[Block]) -> list[str]:
    """Executable blocks that do not say how they are run, one sentence each."""
    ways = ", ".join(WAYS)
    return [
        f"line {block.line}: a {block.language} block says run: {block.way}; write one of {ways} before it"
        for block in blocks
        if block.language in EXECUTABLE and block.way not in WAYS
    ]
