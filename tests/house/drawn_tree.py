"""The tree of ARCHITECTURE.md, drawn from the files: `python -m tests.house.drawn_tree` writes it.

A file's remark is the first sentence of its own docstring, so it is kept where the code is. A folder's remark stands
in FOLDERS; one that is drawn closed there shows no contents.

Running example:
    server/                    the product
      engine/                  one loop
        request.py             What a caller asks of the engine
"""

from __future__ import annotations

import ast
import re
from pathlib import PurePosixPath
from typing import NamedTuple

from tests.house.tracked import ROOT, tracked_files

PLACE = re.compile(r"(<!-- tree -->\n+```text\n)(.*?)(```)", re.DOTALL)
REMARK_COLUMN = 34


class Folder(NamedTuple):
    remark: str
    is_closed: bool = False


FOLDERS = {
    "peft_core/": Folder("mathematics of adapters: no HTTP, no scheduling, nothing of ours below it"),
    "peft_core/hooks/": Folder("forms that act elsewhere than at linear sites, only while a step needs them"),
    "peft_core/kernels/": Folder("the products of rows and adapters"),
    "peft_core/methods/": Folder("decoders: what all of them share, and a folder for each family of kinds"),
    "peft_core/methods/adapterhub/": Folder("everything that AdapterHub's library writes"),
    "peft_core/methods/in_place/": Folder("kinds that scale, shift or turn what is there"),
    "peft_core/methods/lora/": Folder("LoRA with all its variants; rows of tokens"),
    "peft_core/methods/low_rank/": Folder("kinds that are a low rank once their own formula is computed"),
    "peft_core/methods/prompt/": Folder("tokens before the prompt"),
    "peft_core/methods/tuner/": Folder("what files of all of PEFT's tuners have in common"),
    "peft_core/methods/whole_matrix/": Folder("kinds that are no less than a matrix"),
    "adapters_store/": Folder("files on disk: no torch, no model"),
    "server/": Folder("the product"),
    "server/api/": Folder("HTTP, and nothing but"),
    "server/front/": Folder("text in, text out"),
    "server/library/": Folder("introduces adapters to the store"),
    "server/library/sources/": Folder("where adapters come from when nobody uploads them"),
    "server/setting_groups/": Folder("every setting, a file for each heading of `--help`"),
    "server/engine/": Folder("one loop: requests to steps to tokens"),
    "server/loader/": Folder("the process that reads, checks, decodes and packs"),
    "server/convert/": Folder("adapters in formats that are not served, made into ones that are"),
    "server/demo/": Folder("the built-in base, its adapters and how both were trained"),
    "bench/": Folder("workloads and measurements; results are committed"),
    "docker/": Folder("the image and a compose file", is_closed=True),
    "tests/": Folder("one folder a package, one more for the rules of the house", is_closed=True),
}


def draw(files: dict[str, str]) -> str:
    """The tree of some Python files (path -> source), folders before the files of their parent, each sorted.

    Raises:
        KeyError: a folder without a remark in FOLDERS.
        ValueError: a file without a docstring to take its remark from.
    """
    shown = {path: source for path, source in files.items() if not path.endswith("/__init__.py")}
    lines: list[str] = []
    for folder, remark in FOLDERS.items():
        inside = sorted(path for path in shown if f"{PurePosixPath(path).parent}/" == folder)
        lines.append(_line(folder.count("/") - 1, folder.rstrip("/").split("/")[-1] + "/", remark.remark))
        if not remark.is_closed:
            lines += [
                _line(folder.count("/"), path.split("/")[-1], first_sentence(path, shown[path])) for path in inside
            ]
    for path in shown:
        _check_folder(path)
    return "\n".join(lines) + "\n"


def first_sentence(path: str, source: str) -> str:
    """Of the module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        raise ValueError(f"{path} has no docstring to describe it in the tree")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"[.:](?:\s|$)", paragraph)[0]


def sources() -> dict[str, str]:
    return {path: (ROOT / path).read_text() for path in tracked_files("*.py") if "/" in path}


def _check_folder(path: str) -> None:
    parents = [f"{parent}/" for parent in PurePosixPath(path).parents]
    if not any(parent in FOLDERS and (FOLDERS[parent].is_closed or parent == parents[0]) for parent in parents):
        raise KeyError(f"{parents[0]} has no remark in FOLDERS of tests/house/drawn_tree.py")


def _line(depth: int, name: str, remark: str) -> str:
    return f"{'  ' * depth + name:<{REMARK_COLUMN}}{remark}"


def main() -> None:
    document = ROOT / "ARCHITECTURE.md"
    tree = draw(sources())
    text, num_places = PLACE.subn(lambda place: place[1] + tree + place[3], document.read_text())
    if num_places != 1:
        raise SystemExit("ARCHITECTURE.md must have one <!-- tree --> with a text block behind it")
    document.write_text(text)


if __name__ == "__main__":
    main()
