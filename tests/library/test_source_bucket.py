"""Buckets as a source, against moto's S3 server and the library that everybody reads S3 with."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from adapters_store.errors import TooLarge
from server.library.errors import SourceDenied, SourceForbidden, SourceNotFound, SourceUnavailable
from server.library.sources.bucket import BucketSource
from server.library.sources.policy import SourcePolicy
from server.library.sources.reference import parse_source
from tests.library.source_samples import KEPT, MAX_BYTES, adapter_files, open_place

SECRET = "secret-of-the-server"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of it; the bucket `models` holds an adapter under team/sql."""
    urllib.request.urlopen(urllib.request.Request(f"{moto}/moto-api/reset", method="POST")).close()
    for name, value in {
        "AWS_ENDPOINT_URL": moto,
        "AWS_ACCESS_KEY_ID": "key-of-the-server",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    put(client, adapter_files(num_bytes=3_000_000))
    return client


def put(client: Any, files: dict[str, bytes], folder: str = "team/sql") -> None:
    for name, content in files.items():
        client.put_object(Bucket="models", Key=f"{folder}/{name}", Body=content)


def ask_for_credentials(moto: str, num_free: str) -> None:
    """After so many calls moto looks at who asks."""
    order = urllib.request.Request(
        f"{moto}/moto-api/reset-auth", num_free.encode(), {"Content-Type": "text/plain"}, method="POST"
    )
    urllib.request.urlopen(order).close()


def pull(tmp_path: Path, uri: str) -> Any:
    """The version that it became; nothing may be left of a failure."""

    async def inside() -> Any:
        async with open_place(tmp_path / "store", SourcePolicy()) as place:
            try:
                return (await place.puller.pull(uri, "sql")).version
            except Exception:
                assert place.is_untouched()
                raise

    return asyncio.run(inside())


def test_a_folder_of_a_bucket(tmp_path: Path, s3: Any) -> None:
    put(s3, {"adapter_config.json": b"{}"}, "team/sql/checkpoint-1")
    version = pull(tmp_path, "s3://models/team/sql/")
    assert [file.path for file in version.files] == KEPT
    assert (version.source.uri, version.source.revision) == ("s3://models/team/sql", None)
    tags = {name: s3.head_object(Bucket="models", Key=f"team/sql/{name}")["ETag"] for name in KEPT}
    assert version.source.stamp == {file.path: [file.size, tags[file.path]] for file in version.files}


def test_a_file_that_is_replaced_while_it_is_read_is_in_no_version(s3: Any) -> None:
    source = BucketSource(parse_source("s3://models/team/sql"))
    listing = source.list_files()
    pieces = source.read(listing.files[0])
    next(pieces)
    put(s3, adapter_files(rank=8, num_bytes=3_000_000))
    with pytest.raises(SourceUnavailable, match="was replaced while it was read"):
        list(pieces)


def test_what_is_not_there(tmp_path: Path, s3: Any) -> None:
    for uri in ("s3://models/team/nothing", "s3://no-such-bucket/sql", "s3://models/team"):
        with pytest.raises(SourceNotFound):
            pull(tmp_path, uri)


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path, s3: Any) -> None:
    put(s3, {"adapter_model.safetensors": bytes(MAX_BYTES + 1)})
    with pytest.raises(TooLarge):
        pull(tmp_path, "s3://models/team/sql")


def test_credentials_that_the_bucket_does_not_know(tmp_path: Path, s3: Any, moto: str) -> None:
    ask_for_credentials(moto, "0")
    try:
        with pytest.raises(SourceDenied, match="may not read s3://models/team/sql"):
            pull(tmp_path, "s3://models/team/sql")
    finally:
        ask_for_credentials(moto, "inf")


def test_nobody_answers(tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SourceUnavailable, match="cannot be read") as caught:
        pull(tmp_path, "s3://models/team/sql")
    assert SECRET not in str(caught.value)


def test_a_kind_of_bucket_whose_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SourceForbidden, match=r"Install `veneer\[gcs\]`"):
        pull(tmp_path, "gs://models/team/sql")
