"""`veneer keys`: keys that are bound to adapters and to what they may do, and what they have used.

    veneer keys add bi --adapters sql --adapters 'bi/*'      prints the key, once
    veneer keys list                                         names and scopes; nobody can print a key again
    veneer keys revoke bi                                    a running server sees it at once
    veneer keys usage                                        asks a running server for its ledger

Exit codes: 0 done, 1 the file or the server said no, 2 wrong usage, 3 the server cannot be reached.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, NoReturn
from urllib.parse import urlencode

import typer
from pydantic import ValidationError

from server.cli_server import DEFAULT_URL, SAID_NO, WRONG_USAGE, AsJson, Key, Url, ask
from server.keys import KeyRecord, KeysFileError, add_key, digest_of, draw_key, read_keys, revoke_key

app = typer.Typer(help="Keys with scopes, in a file that `veneer serve --keys-file` reads.", no_args_is_help=True)
_File = Annotated[
    Path, typer.Option("--file", envvar="VENEER_KEYS_FILE", dir_okay=False, help="The keys file; made by `add`.")
]
_Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.command()
def add(
    name: _Name,
    file: _File,
    scope: Annotated[list[str] | None, typer.Option(help="read, generate or admin; repeatable.")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option(help="A name, a beginning like 'bi/*', or '*'; repeatable. Default: all.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Whether it may use the base without an adapter.")] = True,
    tenant: Annotated[str | None, typer.Option(help="Keys of one tenant share cached prompts.")] = None,
    expires_days: Annotated[float | None, typer.Option(help="Days until it opens nothing.", min=0, max=36_500)] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a key and print it; the file holds its digest. By default it may generate, on every adapter."""
    key, now = draw_key(), datetime.now(UTC)
    try:
        record = KeyRecord.model_validate(
            {
                "name": name,
                "sha256": digest_of(key),
                "scopes": scope or ["generate"],
                "adapters": adapters or ["*"],
                "base": base,
                "tenant": tenant,
                "created_at": now,
                "expires_at": None if expires_days is None else now + timedelta(days=expires_days),
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        _say_no(f"{problem['loc'][0]}: {problem['msg'].removeprefix('Value error, ')}", WRONG_USAGE)
    try:
        add_key(file, record)
    except KeysFileError as error:
        _say_no(str(error), SAID_NO)
    if as_json:
        print(json.dumps({"key": key, **record.model_dump(mode="json", exclude={"sha256"})}))
        return
    print(key)
    print(f"veneer: this is the only time that the key of {name} is shown", file=sys.stderr)


@app.command("list")
def list_keys(file: _File, as_json: AsJson = False) -> None:
    """Every key's name and what it opens."""
    try:
        records = read_keys(file)
    except KeysFileError as error:
        _say_no(str(error), SAID_NO)
    if as_json:
        print(json.dumps([record.model_dump(mode="json", exclude={"sha256"}) for record in records]))
        return
    print(f"{'NAME':24}{'SCOPES':22}{'TENANT':24}{'EXPIRES':22}ADAPTERS")
    for record in records:
        expires = "never" if record.expires_at is None else f"{record.expires_at:%Y-%m-%dT%H:%M:%SZ}"
        adapters = ", ".join(record.adapters) + ("" if record.base else " (not the base)")
        print(f"{record.name:24}{','.join(record.scopes):22}{record.tenant or '-':24}{expires:22}{adapters}")


@app.command()
def revoke(name: _Name, file: _File) -> None:
    """Take a key out of the file; running servers refuse it from the next request on."""
    try:
        revoke_key(file, name)
    except KeysFileError as error:
        _say_no(str(error), SAID_NO)
    print(f"{name} is revoked")


@app.command()
def usage(
    url: Url = DEFAULT_URL,
    key: Key = None,
    since: Annotated[str | None, typer.Option(help="First day, in UTC: 2026-11-01.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day, in UTC.")] = None,
    as_json: AsJson = False,
) -> None:
    """Requests and tokens by key and adapter version, over all servers of the store."""
    days = {name: day for name, day in (("since", since), ("until", until)) if day is not None}
    found = ask(url, key, lambda client: client.call("GET", "/usage?" + urlencode(days)))["data"]
    if as_json:
        print(json.dumps(found))
        return
    print(f"{'KEY':24}{'ADAPTER':32}{'REQUESTS':>10}{'UNFINISHED':>12}{'PROMPT':>14}{'CACHED':>14}{'GENERATED':>14}")
    for row in found:
        adapter = "(base)" if row["adapter"] is None else f"{row['adapter']}@{row['version']}"
        tokens = "".join(f"{row[name]:>14,}" for name in ("prompt_tokens", "cached_tokens", "generated_tokens"))
        print(f"{row['key'] or '(none)':24}{adapter:32}{row['requests']:>10,}{row['unfinished']:>12,}{tokens}")


def _say_no(reason: str, status: int) -> NoReturn:
    print(f"veneer: {reason}", file=sys.stderr)
    raise typer.Exit(status)
