"""Writes the corpus of hostile uploads: `python -m tests.adapters_store.hostile.make_corpus`.

Every member is a whole HTTP request: `corpus.json` says how it is sent and which answer it must get, `members/` holds
its body. The same bytes come out every time; a test compares them with what is committed, another sends them all.
"""

from __future__ import annotations

import json
import shutil

from tests.adapters_store.hostile.hostile_adapters import adapters
from tests.adapters_store.hostile.hostile_archives import archives
from tests.adapters_store.hostile.hostile_member import HERE, HostileMember
from tests.adapters_store.hostile.hostile_requests import requests


def make_corpus() -> list[HostileMember]:
    return [*archives(), *adapters(), *requests()]


def listing(members: list[HostileMember]) -> str:
    """The content of `corpus.json`."""
    about = "Written by make_corpus.py. Each member is one request; a server must answer with status and code."
    return json.dumps({"about": about, "members": [member.to_json() for member in members]}, indent=1) + "\n"


def main() -> None:
    folder = HERE / "members"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    members = make_corpus()
    for member in members:
        (folder / f"{member.name}.bin").write_bytes(member.body)
    (HERE / "corpus.json").write_text(listing(members))


if __name__ == "__main__":
    main()
