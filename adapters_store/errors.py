"""What can go wrong between a caller and the store.

    StoreError
    ├── InvalidName           a name, alias or reference outside the grammar
    ├── InvalidWeights        an alias without a version, or with a share that is none
    ├── InvalidAttribute      a label, description or retention outside the rules
    ├── UploadRefused
    │   ├── FileRefused       a path that climbs, is not on the allow-list, or comes twice
    │   ├── TooLarge          a cap on bytes or files
    │   ├── DigestMismatch    the bytes are not those that the caller announced
    │   ├── UnsafeArchive     a link, a device, a path that climbs: more than plain files of one folder
    │   ├── MalformedArchive  an archive that is cut short, damaged, or none
    │   └── InvalidHeader     not a well-formed safetensors file (names the tensor where one is to blame)
    ├── DiskFull              not enough free space to take it
    ├── StagingFull           what is under way takes as much of the disk as it may; try again
    ├── NotFound
    │   ├── AdapterNotFound
    │   ├── VersionNotFound
    │   ├── BlobNotFound      no file of that digest was sent
    │   └── AliasNotFound
    ├── AdapterExists         the caller wanted to create, and it is there
    ├── PreconditionFailed    the adapter is not as the caller expects it to be
    ├── AliasInUse            a version cannot be deleted while an alias points to it
    ├── NothingToRollBack     no earlier meaning of the alias is still there
    └── StoreUnusable
        ├── StoreBusy         another process keeps it locked for longer than is waited
        └── StoreDamaged      unknown schema, or a committed file that cannot be read

`code` is stable: scripts and HTTP answers build on it. Nothing here knows HTTP.
"""

from __future__ import annotations

from typing import ClassVar


class StoreError(Exception):
    """Base of all errors of this package."""

    code: ClassVar[str] = "store_error"


class InvalidName(StoreError):
    code = "invalid_name"


class InvalidWeights(StoreError):
    code = "invalid_weights"


class InvalidAttribute(StoreError):
    code = "invalid_attribute"


class UploadRefused(StoreError):
    code = "upload_refused"


class FileRefused(UploadRefused):
    code = "file_refused"


class TooLarge(UploadRefused):
    code = "too_large"


class DigestMismatch(UploadRefused):
    code = "digest_mismatch"


class UnsafeArchive(UploadRefused):
    code = "unsafe_archive"


class MalformedArchive(UploadRefused):
    code = "malformed_archive"


class InvalidHeader(UploadRefused):
    """A safetensors file that lies about itself or is cut short.

    Attributes:
        tensor: name of the tensor to blame, None when the file as a whole is.
    """

    code = "invalid_safetensors"

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


class DiskFull(StoreError):
    code = "disk_full"


class StagingFull(StoreError):
    code = "staging_full"


class NotFound(StoreError):
    code = "not_found"


class AdapterNotFound(NotFound):
    code = "adapter_not_found"


class VersionNotFound(NotFound):
    code = "version_not_found"


class BlobNotFound(NotFound):
    code = "blob_not_found"


class AliasNotFound(NotFound):
    code = "alias_not_found"


class AdapterExists(StoreError):
    code = "adapter_exists"


class PreconditionFailed(StoreError):
    code = "precondition_failed"


class AliasInUse(StoreError):
    code = "alias_in_use"


class AdapterPinned(StoreError):
    code = "adapter_pinned"


class NothingToRollBack(StoreError):
    code = "nothing_to_roll_back"


class StoreUnusable(StoreError):
    code = "store_unusable"


class StoreBusy(StoreUnusable):
    code = "store_busy"


class StoreDamaged(StoreUnusable):
    code = "store_damaged"
