"""The one grammar of where an adapter comes from, for routes, command line and environment alike.

    org/repo                        the Hugging Face Hub, its branch `main`
    org/repo@v2#adapters/sql        another branch, tag or commit; a folder inside the repository
    hf://org/repo, huggingface://   the same
    /adapters/sql, file:///...      a directory of the server's machine
    s3://bucket/folder, gs://       a folder of a bucket
    https://host/folder/            a folder of a web server
    https://host/sql.tgz            an archive of one: .tar, .tar.gz, .tgz or .zip

The text comes from a caller, so it is taken apart here, once, and everything that is no plain name is refused: what
passes has no credentials, no climbing part, no control character, and no second scheme hidden inside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote, urlsplit

from server.library.errors import SourceInvalid

_MAX_CHARS = 2000
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9._-]{1,200}", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", re.ASCII)
_KEY_PART = re.compile(r"[A-Za-z0-9 !'()=+,&@$;._-]{1,500}", re.ASCII)  # no wildcards, no colons: no chained schemes
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:.]{2,45}", re.ASCII)
_WEB_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/%-]*", re.ASCII)
_GRAMMAR = (
    "org/repo[@revision][#folder] or hf://org/repo for the Hub, an absolute path, file://, s3://bucket/folder, "
    "gs://bucket/folder, https://host/folder/ or https://host/archive.tgz"
)


class Scheme(StrEnum):
    HUB = "hf"
    LOCAL = "file"
    S3 = "s3"
    GS = "gs"
    WEB = "https"


@dataclass(frozen=True, slots=True)
class SourceReference:
    """`str()` is what is recorded with a version: the same place in one spelling."""

    scheme: Scheme
    place: str  # "org/repo", "/adapters/sql", "bucket/folder", "https://host/folder/"
    revision: str | None = None  # Hub only: as the caller named it
    folder: str = ""  # Hub only: inside the repository

    def __str__(self) -> str:
        if self.scheme is Scheme.WEB:
            return self.place
        folder = f"#{self.folder}" if self.folder else ""
        return f"{self.scheme}://{self.place}{folder}"


def parse_source(text: str) -> SourceReference:
    """What a source's text means. Raises SourceInvalid saying what it should look like."""
    if len(text) > _MAX_CHARS or not text.isprintable() or text != text.strip():
        raise SourceInvalid(f"{text[:100]!r} is no source: {_GRAMMAR}.")
    if text.startswith("/"):
        return _local(text, text)
    scheme, colon, rest = text.partition("://")
    if not colon:
        return _hub(text, text)
    parsers = {"hf": _hub, "huggingface": _hub, "file": _file, "s3": _bucket, "gs": _bucket, "https": _web}
    parse = parsers.get(scheme.lower())
    if parse is None:
        raise SourceInvalid(f"sources of the kind {scheme[:40]!r} are not supported. Those that are: {_GRAMMAR}.")
    return parse(text, rest)


def _hub(text: str, rest: str) -> SourceReference:
    before, hash_sign, folder = rest.partition("#")
    repo, at, revision = before.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise SourceInvalid(f"{text[:200]!r} names no repository of the Hub; a source is {_GRAMMAR}.")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise SourceInvalid(f"{revision[:100]!r} is no branch, tag or commit of the Hub.")
    folder = folder.strip("/")
    if hash_sign and not (folder and all(_is_plain(part) for part in folder.split("/"))):
        raise SourceInvalid(f"{folder[:100]!r} is no folder of a repository: letters, digits, '.', '_', '-' and '/'.")
    return SourceReference(Scheme.HUB, repo, revision or None, folder)


def _file(text: str, rest: str) -> SourceReference:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash or "?" in path or "#" in path:
        raise SourceInvalid(f"{text[:200]!r}: write file:///absolute/path, without a host.")
    return _local(text, unquote("/" + path))


def _local(text: str, path: str) -> SourceReference:
    parts = path.strip("/").split("/")
    if not path.startswith("/") or "\0" in path or not path.isprintable() or ".." in parts:
        raise SourceInvalid(f"{text[:200]!r} is no absolute path without '..'.")
    return SourceReference(Scheme.LOCAL, "/" + "/".join(part for part in parts if part not in ("", ".")))


def _bucket(text: str, rest: str) -> SourceReference:
    bucket, _, folder = rest.rstrip("/").partition("/")
    parts = folder.split("/") if folder else []
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise SourceInvalid(f"{text[:200]!r}: {bucket[:80]!r} is no bucket's name.")
    wrong = next((part for part in parts if not _KEY_PART.fullmatch(part) or part in (".", "..")), None)
    if wrong is not None:
        raise SourceInvalid(f"{text[:200]!r}: {wrong[:80]!r} is no part of a folder's name in a bucket.")
    scheme = Scheme.S3 if text[:2].lower() == "s3" else Scheme.GS
    return SourceReference(scheme, "/".join((bucket, *parts)))


def _web(text: str, rest: str) -> SourceReference:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise SourceInvalid(f"an address that cannot be read: {error}.") from None
    if "@" in parts.netloc:
        raise SourceInvalid("the address holds credentials; send them as the source's `token`, never in the address.")
    if parts.query or parts.fragment:
        raise SourceInvalid("the address has a query or a fragment; name the folder of the adapter alone.")
    if not _HOST.fullmatch(host):
        raise SourceInvalid(f"{host[:100]!r} is no host's name.")
    path = parts.path or "/"
    if not _WEB_PATH.fullmatch(path) or any(unquote(part) in (".", "..") for part in path.split("/")):
        raise SourceInvalid(f"{path[:200]!r} is no plain path: letters, digits and %-escapes, without '..'.")
    netloc = (f"[{host}]" if ":" in host else host) + ("" if port in (None, 443) else f":{port}")
    return SourceReference(Scheme.WEB, f"https://{netloc}{path}")


def _is_plain(part: str) -> bool:
    return bool(_PART.fullmatch(part)) and part not in (".", "..")
