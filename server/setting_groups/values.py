"""How a setting's text becomes a value: sizes, lists, patterns, as flags, environment and config file spell them."""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BeforeValidator, SecretStr

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_ADAPTER_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._*?-]+", re.ASCII)
_ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?[bB])?")


def parse_size(value: object) -> object:
    """`"1.5G"` -> 1610612736. Upper-case letters are powers of 1024, lower-case of 1000 (as vLLM reads them)."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size; write a number and perhaps a suffix, e.g. 65536, 64k, 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2]])


def split_list(value: object) -> object:
    """`"a,b"` -> `("a", "b")`; a JSON list stays a list. Environment variables carry lists this way."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        return json.loads(text)
    if text.startswith("{"):
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


class LoraModule(NamedTuple):
    """One `--lora-modules` entry: an adapter directory to register under a name at start."""

    name: str
    path: str


def parse_lora_module(value: object) -> object:
    """`"sql=/adapters/sql"` or `{"name": "sql", "path": "/adapters/sql"}` (as text or mapping) -> LoraModule."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict):
        extra = set(value) - {"name", "path", "base_model_name"}
        if extra or not {"name", "path"} <= set(value):
            raise ValueError(f'{value!r} must have the fields "name" and "path" (and may have "base_model_name")')
        return LoraModule(str(value["name"]), str(value["path"]))
    if isinstance(value, str):
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise ValueError(f'{value!r} is not NAME=PATH (nor JSON like {{"name": "sql", "path": "/adapters/sql"}})')
        return LoraModule(name, path)
    return value


def check_network(value: str) -> str:
    """`"10.1.0.0/16"` as it is."""
    ipaddress.ip_network(value)
    return value


def check_adapter_pattern(value: str) -> str:
    """`"org/sql-*"` as it is. The owner must be spelled out: a wildcard there would let anybody's adapters in."""
    if not _ADAPTER_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} must be OWNER/PATTERN with the owner spelled out, e.g. org/* or org/sql-*")
    return value


def check_address(value: str) -> str:
    """`"https://hub.example/"` without the slash at its end."""
    if not _ADDRESS.fullmatch(value):
        raise ValueError(f"{value!r} is no address like https://hub.example")
    return value.rstrip("/")


Size = Annotated[int, BeforeValidator(parse_size)]
Words = Annotated[tuple[str, ...], BeforeValidator(split_list)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(split_list)]
_Module = Annotated[LoraModule, BeforeValidator(parse_lora_module)]
LoraModules = Annotated[tuple[_Module, ...], BeforeValidator(split_list)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(split_list)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(check_network)], ...], BeforeValidator(split_list)]
AdapterPatterns = Annotated[
    tuple[Annotated[str, AfterValidator(check_adapter_pattern)], ...], BeforeValidator(split_list)
]
Address = Annotated[str, AfterValidator(check_address)]
