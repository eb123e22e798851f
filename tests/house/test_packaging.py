"""The versions that set-up installs are exact, and are versions that the package allows."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.tracked import ROOT, tracked_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(text: str) -> dict[str, str]:
    """Name -> exact version of a constraints file; a line of another shape is an error."""
    versions: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, equals, version = line.partition("==")
        if not equals or re.search(r"[\s;+*<>]", version):
            raise ValueError(f"{line!r} is not NAME==VERSION without a build suffix")
        versions[canonicalize_name(name)] = version
    return versions


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def unmet(needed: list[Requirement], versions: dict[str, str]) -> list[str]:
    """Requirements that are not pinned, or pinned to a version that they exclude."""
    found = []
    for requirement in needed:
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            found.append(f"{requirement.name} has no exact version in constraints.txt")
        elif version not in requirement.specifier:
            found.append(f"{requirement.name} is pinned to {version}, which {requirement.specifier} excludes")
    return found


def test_every_requirement_has_an_exact_version_that_it_allows() -> None:
    assert unmet(requirements(), pinned((ROOT / "constraints.txt").read_text())) == []


def test_a_missing_or_excluded_version_is_found() -> None:
    needed = [Requirement("torch>=2.11"), Requirement("typer>=0.20")]
    assert len(unmet(needed, {"torch": "2.10.0"})) == 2


def test_the_command_and_the_data_that_ships_are_declared() -> None:
    assert PROJECT["scripts"] == {"veneer": "server.__main__:main"}
    assert PROJECT["requires-python"] == ">=3.11"
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_the_changelog_knows_the_version() -> None:
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings, "CHANGELOG.md has no versions"
    assert headings[0] in (PROJECT["version"], "Unreleased")


def test_what_an_automatic_check_runs_is_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert "make test" in script
    assert "make test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert ".ci/run" in tracked_files("run")
