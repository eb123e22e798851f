"""`veneer adapters inspect` and `convert`: what needs no server.

Exit codes: 0 yes, 1 no (it would be refused, cannot be read, or cannot be converted), 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from adapters_store.errors import StoreError
from server.cli_server import SAID_NO
from server.engine.errors import EngineStartError
from server.inspection import Inspection, inspect, inspect_on
from server.loader.errors import AdapterRefused

_Directory = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="An adapter's directory.")]
_Base = Annotated[
    str | None, typer.Option("--base", help="Base model, a directory or a hub id: check against it. Loads it.")
]


def inspect_adapter(
    directory: _Directory,
    base: _Base = None,
    revision: Annotated[str | None, typer.Option(help="Of a base on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """What an adapter's directory holds; with --base also whether it is served, what it costs and how far it goes."""
    _require_base_for(revision, base)
    try:
        found = inspect(directory) if base is None else inspect_on(directory, base, revision)
    except EngineStartError as error:
        _say_no(str(error))
    except (StoreError, OSError, ValueError) as error:
        _say_no(f"{directory}: {error}")
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _print(found)
    if found.served is False:
        raise typer.Exit(SAID_NO)


def convert_adapter(
    source: Annotated[Path, typer.Argument(help="An adapter's directory: pickled, MLX, or one that needs its base.")],
    destination: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model: rewrite PiSSA, OLoRA and the like as plain LoRA.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a base on the Hub.")] = None,
) -> None:
    """Make an adapter in another format one that can be served. Pickles are opened in a child that runs no code."""
    _require_base_for(revision, base)
    from peft_core.errors import AdapterError
    from server.convert.conversion import convert
    from server.convert.errors import ConversionRefused
    from server.engine.base_model import find_model

    refusals = (ConversionRefused, AdapterError, AdapterRefused, StoreError, EngineStartError, OSError, ValueError)
    try:
        found = None if base is None else find_model(base, revision)
        done = convert(source, destination, found)
    except refusals as error:
        _say_no(str(error))
    for step in done.steps:
        print(f"- {step}")
    print(f"wrote {destination}")


def _print(found: Inspection) -> None:
    shown: dict[str, Any] = dict(found.facts)
    if found.served is not None:
        shown["served"] = "yes" if found.served else f"no: {found.reason}"
    report = found.report
    if report:
        shown |= {
            "forms": ", ".join(report.get("forms", ())) or "-",
            "modules": len(report["sites"]),
            "ranks": report["ranks"],
            "device_bytes": f"{report['device_bytes']:,} ({report['device_dtype']})",
            "probe": _probe_line(report["probe"]),
        }
    for name, value in shown.items():
        print(f"{name:20}{value}")
    for warning in report.get("warnings", ()):
        print(f"{'warning':20}{warning}")


def _probe_line(probe: dict[str, Any]) -> str:
    if "failed" in probe:
        return f"failed: {probe['failed']}"
    return (
        f"moves log probabilities by up to {probe['largest_change']:.3g}, {probe['mean_change']:.3g} on average, "
        f"on {probe['tokens']} tokens"
    )


def _require_base_for(revision: str | None, base: str | None) -> None:
    if revision is not None and base is None:
        raise typer.BadParameter("it is the revision of a base; name the base with --base.", param_hint="--revision")


def _say_no(message: str) -> NoReturn:
    print(f"veneer: {message}", file=sys.stderr)
    raise typer.Exit(SAID_NO) from None
