"""The grammar of sources: what each text means, and what is refused before anybody is asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.library.errors import SourceInvalid
from server.library.sources.reference import Scheme, SourceReference, parse_source


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("org/repo", SourceReference(Scheme.HUB, "org/repo")),
        ("org/repo@v1.2", SourceReference(Scheme.HUB, "org/repo", "v1.2")),
        ("org/repo@refs/pr/3#a/b", SourceReference(Scheme.HUB, "org/repo", "refs/pr/3", "a/b")),
        ("hf://org/repo@main", SourceReference(Scheme.HUB, "org/repo", "main")),
        ("huggingface://org/repo#sql/", SourceReference(Scheme.HUB, "org/repo", None, "sql")),
        ("/adapters//sql/./x/", SourceReference(Scheme.LOCAL, "/adapters/sql/x")),
        ("file:///adapters/my%20sql", SourceReference(Scheme.LOCAL, "/adapters/my sql")),
        ("file://localhost/a", SourceReference(Scheme.LOCAL, "/a")),
        ("s3://my-bucket/team/sql/", SourceReference(Scheme.S3, "my-bucket/team/sql")),
        ("gs://my-bucket", SourceReference(Scheme.GS, "my-bucket")),
        ("https://h.example/a/b/", SourceReference(Scheme.WEB, "https://h.example/a/b/")),
        ("HTTPS://H.example:443/a%20b", SourceReference(Scheme.WEB, "https://h.example/a%20b")),
        ("https://[::1]:8443/", SourceReference(Scheme.WEB, "https://[::1]:8443/")),
    ],
)
def test_what_a_text_means(text: str, meaning: SourceReference) -> None:
    assert parse_source(text) == meaning


@pytest.mark.parametrize(
    "text",
    [
        "", "sql", "./sql", "../sql", "~/sql", " org/repo", "org/repo ", "org/repo\n", "org/repo/more", "org//repo",
        "org/../repo", "../repo", "org/re--po", "org/repo@", "org/repo@../x", "org/repo@a b", "org/repo@-x",
        "org/repo#", "org/repo#..", "org/repo#a/../b", "org/repo#/", "hf://org", "hf://tok@org/repo", "org/repo?x=1",
        "/a/../../etc/passwd", "file://host/a", "file:///a/%2e%2e/b", "file:///a%00b", "file:///a?x", "file://[",
        "file://", "/a\0b",
        "s3://", "s3:///key", "s3://Bucket/x", "s3://b..x/k", "s3://bucket/../other", "s3://bucket/a//b",
        "s3://bucket/a*b", "s3://bucket/a?b", "s3://bucket/simplecache::file://x", "s3://key:secret@bucket/x",
        "simplecache::s3://bucket/x", "gs://bucket/a\\b",
        "http://h.example/a/", "ftp://h/a", "pvc://a/b", "ms://org/repo", "github://a/b", "data://x",
        "https://", "https:///a", "https://user:pass@h.example/a/", "https://tok@h.example/", "https://h.example/a?x=1",
        "https://h.example/a#b", "https://h.example:99999/", "https://h.example:x/", "https://h.example/../x",
        "https://h.example/%2e%2e/x", "https://h.example/a b", "https://h ex/a", "https://h.example\\@evil/",
        "https://hé.example/", "https://h.example/é", "https://[::1/", "https://-h/", "x" * 3000,
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(SourceInvalid):
        parse_source(text)


def test_a_refusal_never_repeats_credentials() -> None:
    with pytest.raises(SourceInvalid) as caught:
        parse_source("https://user:hunter2@h.example/a/")
    assert "hunter2" not in str(caught.value)


@settings(max_examples=600)
@given(st.text(max_size=60) | st.from_regex(r"(hf|s3|gs|file|https)://[\x20-\x7e]{0,40}", fullmatch=True))
def test_whatever_passes_has_one_spelling_and_nothing_that_climbs(text: str) -> None:
    try:
        reference = parse_source(text)
    except SourceInvalid:
        return
    assert ".." not in reference.place.split("/")
    assert "::" not in reference.place or reference.scheme in (Scheme.WEB, Scheme.LOCAL)
    again = parse_source(str(reference).replace("%", "%25") if reference.scheme is Scheme.LOCAL else str(reference))
    assert (again.scheme, again.place, again.folder) == (reference.scheme, reference.place, reference.folder)


def test_libraries_of_sources_are_not_imported_before_they_are_needed() -> None:
    code = (
        "import sys, server.front.front, server.api.app;"
        "print([name for name in ('huggingface_hub', 'fsspec', 's3fs', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
