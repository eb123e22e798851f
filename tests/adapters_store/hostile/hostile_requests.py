"""Requests whose name, body or pace is the trick; their files are sound."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator

from tests.adapters_store.hostile.hostile_member import HostileMember, archive, upload
from tests.adapters_store.hostile.packing import BOUNDARY, form, part, sound, sound_tar, sound_zip

_ADAPTERS = "/admin/v1/adapters/"
_TAR = {"Content-Type": "application/x-tar"}


def requests() -> Iterator[HostileMember]:
    yield from _names()
    yield from _files()
    yield from _parts()
    yield from _bodies()
    yield from _paces()


def _names() -> Iterator[HostileMember]:
    paths = {
        "climbs": "..%2F..%2Fetc%2Fpasswd",
        "climbs-in-dots": "%2e%2e/%2e%2e/x",
        "absolute": "%2Fetc%2Fpasswd",
        "two-slashes": "a%2Fb%2Fc",
        "trailing-slash": "a%2F",
        "double-dots": "a..b",
        "encoded-twice": "a%252Fb",
        "null": "a%00b",
        "space": "a%20b",
        "backslash": "a%5Cb",
        "hidden": ".ssh",
        "a-route": "versions",
        "a-route-behind-a-slash": "a%2Fmetrics",
        "version": "sql@3",
        "comma": "a,b",
        "colon": "base:sql",
        "accent": "caf%C3%A9",
        "full-width": "%EF%BC%A1dapter",
        "right-to-left": "a%E2%80%AEb",
        "not-utf8": "a%FFb",
        "combining": "e%CC%81",
        "arabic-digits": "v%D9%A3",
        "long": "a" * 101,
        "drive": "C%3A%5Cx",
    }
    for name, path in paths.items():
        yield archive(f"name-{name}", "invalid_name", sound_tar(), path=_ADAPTERS + path)
    yield archive("name-newline", "not_found", sound_tar(), 404, path=_ADAPTERS + "a%0Ab")
    alias = _ADAPTERS + "victim?alias="
    yield archive("alias-climbs", "invalid_name", sound_tar(), path=alias + "..%2Fx")
    yield archive("alias-latest", "invalid_name", sound_tar(), path=alias + "latest")
    yield archive("alias-version", "invalid_name", sound_tar(), path=alias + "v3")
    yield archive("flag-misspelt", "invalid_upload", sound_tar(), path=_ADAPTERS + "victim?dryrun=true")
    yield archive("flag-no-truth", "validation", sound_tar(), path=_ADAPTERS + "victim?promote=perhaps")
    yield archive("version-chosen", "invalid_upload", sound_tar(), path=_ADAPTERS + "victim?version=7")
    for name, told in {
        "climbs": "../../x",
        "null": "a\0b",
        "unicode": "\u0430dmin",
    }.items():
        metadata = json.dumps({"name": told}).encode()
        yield upload(f"metadata-name-{name}", "invalid_name", form(sound(), metadata))
    surrogate = form(sound(), b'{"name": "\\ud800"}')
    yield upload("metadata-name-lone-surrogate", "invalid_upload", surrogate)


def _files() -> Iterator[HostileMember]:
    names = {
        "climbs": "../adapter_config.json",
        "absolute": "/etc/passwd",
        "encoded-slash": "..%2Fadapter_config.json",
        "in-a-folder": "sql/adapter_config.json",
        "backslash": "..\\\\adapter_config.json",
        "unicode": "adapter_c\u043enfig.json",
        "pickle": "adapter_model.bin",
        "packed-image": "packed.image",
        "archive-in-the-stage": "received.archive",
        "empty": "",
    }
    for name, path in names.items():
        yield upload(f"file-{name}", "file_refused", form([(path, b"{}"), *sound().items()]))
    yield upload("file-twice", "file_refused", form([*sound().items(), *sound().items()]))
    many = [(f"tokenizer{number}.json", b"") for number in range(40)]
    yield upload("files-many", "too_large", form([*many, *sound().items()]), 413)
    yield upload("file-over-its-cap", "too_large", form([("adapter_model.safetensors", bytes(70_000))]), 413)


def _parts() -> Iterator[HostileMember]:
    files = form(sound())
    first, rest = files.index(b"--corpus\r\n"), files.index(b"--corpus\r\n", 5)
    yield upload("parts-without-metadata", "invalid_upload", files[rest:])
    yield upload("parts-metadata-twice", "invalid_upload", files[first:rest] + files)
    yield upload("parts-unknown", "invalid_upload", files[first:rest] + part('name="shell"', b"id") + files[rest:])
    yield upload("parts-without-a-name", "invalid_upload", files[first:rest] + part("", b"id") + files[rest:])
    yield upload("metadata-unknown-field", "invalid_upload", form(sound(), b'{"name": "victim", "owner": "root"}'))
    yield upload("metadata-not-json", "invalid_upload", form(sound(), b"name=victim"))
    yield upload("metadata-large", "too_large", form(sound(), b'{"name": "victim"' + b" " * 70_000 + b"}"), 413)
    wrong = [{"path": "adapter_config.json", "sha256": "0" * 64}]
    metadata = json.dumps({"name": "victim", "files": wrong}).encode()
    yield upload("metadata-other-digest", "digest_mismatch", form(sound(), metadata), 400)
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name={'a' * 30_000}".encode()
    yield upload("parts-endless-header", "malformed_multipart", head + files, 400)
    yield upload("parts-cut-short", "malformed_multipart", files[:-8], 400)
    yield upload("parts-cut-in-a-file", "malformed_multipart", files[:900], 400)
    yield upload("parts-other-boundary", "malformed_multipart", files.replace(b"corpus", b"carpus"), 400)


def _bodies() -> Iterator[HostileMember]:
    good = sound_tar()
    yield archive("type-says-zip", "unsupported_media_type", good, 415, headers={"Content-Type": "application/zip"})
    yield archive("type-says-tar", "unsupported_media_type", sound_zip(), 415, headers=_TAR)
    yield archive("type-is-html", "unsupported_media_type", good, 415, headers={"Content-Type": "text/html"})
    coded = {"Content-Encoding": "br"}
    yield archive("encoding-unknown", "unsupported_media_type", good, 415, headers=coded)
    digest = base64.b64encode(hashlib.sha256(b"another body").digest()).decode()
    other = {"Repr-Digest": f"sha-256=:{digest}:"}
    yield archive("digest-of-another-body", "digest_mismatch", good, 400, headers=other)
    yield archive("digest-unreadable", "invalid_digest", good, 400, headers={"Repr-Digest": "sha-256=:%%%:"})
    yield archive("digest-of-unknown-kind", "invalid_digest", good, 400, headers={"Digest": "crc32=00000000"})
    yield archive("condition-unreadable", "invalid_precondition", good, 400, headers={"If-Match": "sql"})
    yield archive("condition-on-nothing", "precondition_failed", good, 412, headers={"If-Match": "*"})
    yield archive("announces-a-terabyte", "too_large", good, 413, headers={"Content-Length": str(2**40)})
    yield archive("form-as-archive", "unsupported_media_type", form(sound()), 415,
                  headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})  # fmt: skip
    yield upload("archive-as-form", "unsupported_media_type", good, 415, headers=_TAR)


def _paces() -> Iterator[HostileMember]:
    half = sound_tar()[:1024]
    more = {"Content-Length": "8192"}
    yield archive("stalls", "upload_stalled", half, 408, headers=more, pace="stalls")
    yield archive("drips", "upload_too_slow", half, 408, headers=more, pace="drips")
    yield HostileMember("leaves", None, None, half, headers=more, pace="leaves")
    parts = form(sound())[:900]
    yield upload("form-stalls", "upload_stalled", parts, 408, headers=more, pace="stalls")
