"""The Hugging Face Hub: a revision becomes a commit first, then every file is that commit's.

Bytes stream from the Hub into the store, so nothing is written to the Hub's local cache; what lies there already, put
by whatever program, is what `offline` serves from. Without a token of the request's own the environment's is used
(`HF_TOKEN`, or the one that was logged in with), as everything that speaks to the Hub does; an empty one is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn

import httpx2
from huggingface_hub import HfApi, constants, get_session, get_token, hf_hub_url, hf_raise_for_status, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adapters_store.record import Source
from adapters_store.staging import ALLOWED_FILES, CONFIG_FILE
from server.library.errors import SourceDenied, SourceNotFound, SourceUnavailable
from server.library.sources.listing import CHUNK_BYTES, STALL_S, Listing, SourceFile, choose_files
from server.library.sources.policy import SourcePolicy
from server.library.sources.reference import SourceReference

_NUM_TRIES = 4  # of one file; each goes on where the one before it broke off
_MAX_NAMED = 5


class HubSource:
    def __init__(self, reference: SourceReference, policy: SourcePolicy, token: str | None = None) -> None:
        self._reference = reference
        self._repo = reference.place
        self._endpoint = policy.hub_endpoint
        self._token = token
        if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            self._token = get_token()
        self._is_offline = policy.is_offline or constants.HF_HUB_OFFLINE
        self._commit = ""

    def list_files(self) -> Listing:
        """Raises SourceError, FileRefused."""
        files = self._from_cache() if self._is_offline else self._from_hub()
        return Listing(choose_files(files, self._where), Source(str(self._reference), self._commit))

    def read(self, file: SourceFile) -> Iterator[bytes]:
        """Raises SourceError."""
        if self._is_offline:
            yield from _pieces(Path(file.key))
            return
        num_read = 0
        for tries_left in reversed(range(_NUM_TRIES)):
            try:
                for chunk in self._stream(file.key, num_read):
                    num_read += len(chunk)
                    yield chunk
            except HfHubHTTPError as error:
                self._refuse(error)
            except httpx2.HTTPError as error:
                if not tries_left:
                    raise SourceUnavailable(f"the Hub broke off {file.key!r} of {self._where}: {error}") from error
                continue
            if file.size is None or num_read >= file.size:
                return
        raise SourceUnavailable(f"the Hub sent {num_read} of the {file.size} bytes of {file.key!r} of {self._where}.")

    @property
    def _where(self) -> str:
        folder = f"#{self._reference.folder}" if self._reference.folder else ""
        return f"{self._repo}@{self._reference.revision or 'main'}{folder}"

    def _from_hub(self) -> list[SourceFile]:
        try:
            repo = HfApi(endpoint=self._endpoint).model_info(
                self._repo,
                revision=self._reference.revision,
                files_metadata=True,
                token=self._token or False,
                timeout=STALL_S,
            )
        except HFValidationError as error:
            raise SourceNotFound(f"{self._repo!r} is no repository of the Hub: {error}") from error
        except HfHubHTTPError as error:
            self._refuse(error)
        except OfflineModeIsEnabled as error:
            raise SourceUnavailable(f"the Hub is switched off: {error}") from error
        except httpx2.HTTPError as error:
            raise SourceUnavailable(f"the Hub does not answer: {error}") from error
        if not repo.sha:
            raise SourceUnavailable(f"the Hub names no commit of {self._where}.")
        self._commit = repo.sha
        siblings = repo.siblings or []
        files = [
            SourceFile(
                PurePosixPath(item.rfilename).name, item.rfilename, item.size, item.lfs.sha256 if item.lfs else None
            )
            for item in siblings
            if self._is_here(item.rfilename)
        ]
        self._require_config([file.name for file in files], [item.rfilename for item in siblings])
        return files

    def _from_cache(self) -> list[SourceFile]:
        prefix = f"{self._reference.folder}/" if self._reference.folder else ""
        try:
            found = snapshot_download(
                self._repo,
                revision=self._reference.revision,
                allow_patterns=[prefix + pattern for pattern in ALLOWED_FILES],
                local_files_only=True,
            )
        except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError) as error:
            raise SourceUnavailable(
                f"{self._where} is not in the Hub's local cache, and this server is offline. Fetch it there with "
                f"`hf download {self._repo}`, or upload the adapter."
            ) from error
        snapshot = Path(found)
        self._commit = snapshot.name
        files = [path for path in (snapshot / self._reference.folder).glob("*") if path.is_file()]
        return [SourceFile(path.name, str(path), path.stat().st_size) for path in files]

    def _is_here(self, path: str) -> bool:
        """Whether a file of the repository lies in the folder itself, not below it."""
        parent = str(PurePosixPath(path).parent)
        return (parent == self._reference.folder) or (parent == "." and not self._reference.folder)

    def _require_config(self, names: list[str], everywhere: list[str]) -> None:
        """An adapter in another folder than the named one is worth a hint."""
        if CONFIG_FILE in names:
            return
        others = sorted({path.rpartition("/")[0] for path in everywhere if path.endswith(f"/{CONFIG_FILE}")})
        hint = ""
        if others:
            hint = f" There is one in {', '.join(others[:_MAX_NAMED])}: name it, as in {self._repo}#{others[0]}."
        raise SourceNotFound(f"{self._where} holds no {CONFIG_FILE}, so it is no adapter.{hint}")

    def _stream(self, path: str, start: int) -> Iterator[bytes]:
        url = hf_hub_url(self._repo, path, revision=self._commit, endpoint=self._endpoint)
        headers = {"Accept-Encoding": "identity", "User-Agent": "veneer"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if start:
            headers["Range"] = f"bytes={start}-"
        with get_session().stream("GET", url, headers=headers, timeout=STALL_S) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start
            for chunk in response.iter_bytes(CHUNK_BYTES):
                yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def _refuse(self, error: HfHubHTTPError) -> NoReturn:
        """What the Hub's refusal means here; its own text holds addresses and request numbers, and is left out."""
        status = error.response.status_code
        if isinstance(error, GatedRepoError):
            raise SourceDenied(f"{self._repo} is gated: its owner has not let this token in.") from error
        if isinstance(error, RevisionNotFoundError):
            raise SourceNotFound(f"{self._repo} has no revision {self._reference.revision!r}.") from error
        if isinstance(error, RepositoryNotFoundError):
            raise SourceNotFound(
                f"there is no repository {self._repo} on the Hub, or it is private: send a `token` that may read it."
            ) from error
        if status in (401, 403):
            raise SourceDenied(f"the Hub does not let this token read {self._repo} (status {status}).") from error
        if status == 404:
            raise SourceNotFound(f"{self._where} is not on the Hub.") from error
        raise SourceUnavailable(f"the Hub answered {status} for {self._where}; try again later.") from error


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
