"""`veneer adapters alias|rollback|canary|gate|pin|audit`: which version answers, and what stays in memory.

    veneer adapters alias sql prod 3              everybody gets sql@3
    veneer adapters alias sql prod 3=90 4=10      one of ten gets sql@4
    veneer adapters rollback sql --alias prod     what it meant before
    veneer adapters canary sql 4 --percent 10     until too many of its requests fail
    veneer adapters gate sql prod golden.json     prompts that a version must answer as expected first
    veneer adapters pin sql                       it stays on the device

Exit codes: 0 done, 1 the server said no (or a golden prompt failed), 2 wrong usage, 3 the server cannot be reached.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import quote, urlencode

import typer

from adapters_store.errors import InvalidName
from adapters_store.names import DEFAULT_ALIAS, parse_reference
from server.admin_client import AdminClient
from server.cli_server import DEFAULT_URL, SAID_NO, WRONG_USAGE, AsJson, Key, Url, ask

VersionName = Annotated[str, typer.Argument(metavar="NAME[@VERSION]")]
_Name = Annotated[str, typer.Argument(metavar="NAME")]
_AliasOption = Annotated[str, typer.Option("--alias", help="The alias; by default what the bare name means.")]
_SkipGate = Annotated[bool, typer.Option("--skip-gate", help="Do not ask the alias's golden prompts.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to `veneer adapters`."""
    app.command("alias")(alias)
    app.command("rollback")(rollback)
    app.command("canary")(canary)
    app.command("gate")(gate)
    app.command("pin")(pin)
    app.command("audit")(audit)


def alias(
    name: _Name,
    alias_name: Annotated[str, typer.Argument(metavar="ALIAS")],
    targets: Annotated[list[str] | None, typer.Argument(metavar="VERSION | VERSION=SHARE...")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Forget the alias; the versions stay.")] = False,
    skip_gate: _SkipGate = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show what an alias means, or point it to a version, or to several by weight."""
    if delete and targets:
        _leave("give versions, or --delete")
    if skip_gate and not targets:
        _leave("--skip-gate is for a move; give a version")
    body = _order(targets or [])

    def change(client: AdminClient) -> dict[str, Any]:
        path = client.alias_path(name, alias_name)
        if delete:
            return client.call("DELETE", path)
        if body is not None:
            client.call("PUT", path + ("?skip_gate=true" if skip_gate else ""), body)
        return client.call("GET", path)

    answer = ask(url, key, change)
    said = f"{name}@{alias_name} is forgotten" if delete else f"{name}@{alias_name} means {_meaning(answer['weights'])}"
    told(answer, said, as_json)


def rollback(
    name: _Name,
    alias_name: _AliasOption = DEFAULT_ALIAS,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Give an alias back what it meant before; twice goes back two moves."""
    answer = ask(url, key, lambda client: client.call("POST", client.alias_path(name, alias_name) + "/rollback"))
    told(answer, f"{name}@{alias_name} means {shares_text(answer['aliases'][alias_name])} again", as_json)


def canary(
    name: _Name,
    version: Annotated[int | None, typer.Argument(min=1, help="Starts one; without it the last one is shown.")] = None,
    percent: Annotated[int | None, typer.Option(min=1, max=99, help="Of the alias's requests. Default: 10.")] = None,
    max_error_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="More failures than this roll it back. Default: 0.05.")
    ] = None,
    min_requests: Annotated[int | None, typer.Option(min=1, help="Nothing is decided on fewer. Default: 20.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Last requests that are looked at. Default: 200.")] = None,
    alias_name: _AliasOption = DEFAULT_ALIAS,
    stop: Annotated[bool, typer.Option("--stop", help="The alias means again what it did.")] = False,
    promote: Annotated[bool, typer.Option("--promote", help="The alias means the canary alone.")] = False,
    skip_gate: _SkipGate = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Give a version a share of the requests, which it loses by itself when too many of them fail."""
    if sum((version is not None, stop, promote)) > 1:
        _leave("give a VERSION to start a canary, or --stop, or --promote")
    bounds = {"percent": percent, "max_error_rate": max_error_rate, "min_requests": min_requests, "window": window}
    given = {key: value for key, value in bounds.items() if value is not None}
    if version is None and given:
        _leave(f"--{next(iter(given)).replace('_', '-')} is for starting a canary; give a VERSION")
    if skip_gate and version is None and not promote:
        _leave("--skip-gate is for starting or promoting a canary")
    query = "?skip_gate=true" if skip_gate else ""

    def change(client: AdminClient) -> dict[str, Any]:
        path = client.alias_path(name, alias_name)
        if version is not None:
            return client.call("POST", path + "/canary" + query, {"version": version, **given})
        if stop:
            return client.call("DELETE", path + "/canary")
        shown = client.call("GET", path + "/canary")
        if promote:
            client.call("PUT", path + query, {"version": shown["version"]})
            shown = client.call("GET", path + "/canary")
        return shown

    answer = ask(url, key, change)
    told(answer, _canary_text(name, answer), as_json)


def gate(
    name: _Name,
    alias_name: Annotated[str, typer.Argument(metavar="ALIAS")],
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help='JSON: {"prompts": [{"inputs": ...}]}')
    ] = None,
    check: Annotated[int | None, typer.Option("--check", min=1, help="Ask this version, and move nothing.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="The alias moves freely again.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Put golden prompts before an alias, show them, or ask a version."""
    if sum((file is not None, check is not None, remove)) > 1:
        _leave("give a FILE, or --check VERSION, or --remove")
    body = None if file is None else _json_file(file)

    def change(client: AdminClient) -> dict[str, Any]:
        path = client.alias_path(name, alias_name) + "/gate"
        if remove:
            return client.call("DELETE", path)
        if check is not None:
            return client.call("POST", f"{path}/check?version={check}")
        return client.call("GET", path) if body is None else client.call("PUT", path, body)

    answer = ask(url, key, change)
    if check is None:
        said = "no golden prompts" if remove else f"{len(answer['prompts'])} golden prompts"
        told(answer, f"{name}@{alias_name} has {said}", as_json)
        return
    failed = [f"{one['inputs']!r}: {one['reason']}" for one in answer["results"] if one["reason"] is not None]
    verdict = "passed" if answer["passed"] else "FAILED"
    told(answer, "\n".join([*failed, f"{answer['adapter']} {verdict}"]), as_json)
    if not answer["passed"]:
        raise typer.Exit(SAID_NO)


def pin(
    name: VersionName,
    off: Annotated[bool, typer.Option("--off", help="Let it go again.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Keep an adapter (what its name means, or one version) on the device."""
    adapter, version = name_and_version(name)

    def change(client: AdminClient) -> dict[str, Any]:
        path = f"/adapters/{quote(adapter)}"
        if version is None:
            return client.call("PATCH", path, {"pinned": not off})
        pinned = set(client.show(adapter)["pinned_versions"])
        pinned = pinned - {version} if off else pinned | {version}
        return client.call("PATCH", path, {"pinned_versions": sorted(pinned)})

    told(ask(url, key, change), f"{name} is {'no longer pinned' if off else 'pinned'}", as_json)


def audit(
    name: Annotated[str, typer.Argument(metavar="[NAME]")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10000)] = 50,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Who changed what, the youngest first."""
    query = urlencode({"adapter": name, "limit": limit})
    lines = ask(url, key, lambda client: client.call("GET", f"/audit?{query}"))["data"]
    text = [
        f"{line['at']}  {line['actor']:16}{line['action']:18}{line['target']:24}{json.dumps(line['detail'])}"
        for line in lines
    ]
    told(lines, "\n".join(text), as_json)


def told(answer: Any, sentence: str, as_json: bool) -> None:
    """The whole answer for scripts, or a sentence for people."""
    print(json.dumps(answer) if as_json else sentence)


def name_and_version(text: str) -> tuple[str, int | None]:
    """`name` or `name@3`; leaves the command when it is neither."""
    try:
        parsed = parse_reference(text)
    except InvalidName as error:
        _leave(str(error))
    if parsed.version is None and "@" in text:
        _leave(f"{text!r} names an alias; give the adapter's name, or NAME@VERSION")
    return parsed.name, parsed.version


def shares_text(meaning: int | Mapping[str, int]) -> str:
    """3, or 3:90%+4:10%."""
    if isinstance(meaning, int):
        return str(meaning)
    total = sum(meaning.values())
    return "+".join(f"{version}:{share / total:.0%}" for version, share in meaning.items())


def _meaning(weights: Mapping[str, int]) -> str:
    return next(iter(weights)) if len(weights) == 1 else shares_text(weights)


def _order(targets: list[str]) -> dict[str, Any] | None:
    """The body of a move; None when there is nothing to move to."""
    if not targets:
        return None
    pairs = [target.partition("=") for target in targets]
    if not all(version.isdecimal() and (share.isdecimal() or not equals) for version, equals, share in pairs):
        _leave(f"{' '.join(targets)!r} is neither a version (3) nor versions with shares (3=90 4=10)")
    if len(pairs) == 1 and not pairs[0][1]:
        return {"version": int(pairs[0][0])}
    if not all(equals for _, equals, _ in pairs):
        _leave("several versions need a share each: 3=90 4=10")
    return {"weights": {version: int(share) for version, _, share in pairs}}


def _canary_text(name: str, shown: Mapping[str, Any]) -> str:
    where = f"{name}@{shown['version']} under {shown['alias']!r}"
    if shown["state"] != "running":
        return f"the canary {where} is over ({shown['state']}): {shown['reason']}"
    seen = shown["requests"] or 0
    return f"the canary {where} runs: {shares_text(shown['weights'])}, {shown['failed'] or 0} of {seen} requests failed"


def _json_file(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        _leave(f"{path} is no JSON: {error}")
    if not isinstance(body, dict):
        _leave(f'{path} must hold an object like {{"prompts": [...]}}')
    return body


def _leave(reason: str) -> NoReturn:
    print(f"veneer: {reason}", file=sys.stderr)
    raise typer.Exit(WRONG_USAGE)
