"""Write the table of settings into the README: `python -m tests.house.settings_in_readme`."""

from __future__ import annotations

import re

from server.flags import settings_table
from tests.house.tracked import ROOT

_PLACE = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    table = f"\n{settings_table()}\n\n"
    text, num_places = _PLACE.subn(lambda place: place[1] + table + place[2], readme.read_text())
    if num_places != 1:
        raise SystemExit("README.md must have one <!-- settings --> ... <!-- /settings --> for the table")
    readme.write_text(text)


if __name__ == "__main__":
    main()
