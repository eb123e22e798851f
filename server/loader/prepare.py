"""From the files of one adapter to its packed image: read, check, decode, pack, digest."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from adapters_store.errors import InvalidHeader
from adapters_store.staging import CONFIG_FILE, WEIGHTS_FILE
from peft_core.errors import AdapterError
from peft_core.image import image_key, pack, write_image
from peft_core.methods import decode
from peft_core.spec import BaseModelSpec
from server.loader.effect import effect_digest
from server.loader.errors import AdapterRefused
from server.loader.job import PackingTarget, Prepared, PrepareJob
from server.loader.tensor_file import TensorFile

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 1024 * 1024


class Packer:
    """Prepares adapters for one base and one dtype. Holds no model."""

    def __init__(self, target: PackingTarget) -> None:
        self.target = target
        self._spec = BaseModelSpec.from_json(target.spec)

    @property
    def variant(self) -> str:
        """Names what images are packed for: base, dtype and the packer itself."""
        return image_key("", self._spec.fingerprint, self.target.adapter_dtype)[:16]

    def prepare(self, job: PrepareJob) -> Prepared:
        """Raises AdapterRefused, whatever goes wrong with the adapter."""
        try:
            return self._prepare(job)
        except AdapterRefused:
            raise
        except AdapterError as error:
            raise AdapterRefused(
                error.message, code=error.code, field=error.field, value=error.value, tensor=error.tensor
            ) from error
        except InvalidHeader as error:
            raise AdapterRefused(f"{WEIGHTS_FILE}: {error}", code=error.code, tensor=error.tensor) from error
        except OSError as error:
            raise AdapterRefused(f"a file of the adapter cannot be read: {error}", code="unreadable") from error
        except Exception as error:
            logger.exception("an adapter failed in a way that no decoder foresaw")
            raise AdapterRefused(
                f"the adapter cannot be decoded ({type(error).__name__}: {error}). This is a gap in the decoder; "
                "please report it with the adapter's config.",
                code="decoder_failed",
            ) from error

    def _prepare(self, job: PrepareJob) -> Prepared:
        config = read_config(Path(job.files[CONFIG_FILE]))
        tensors = TensorFile(Path(job.files[WEIGHTS_FILE]))
        forms, report = decode(config, tensors, self._spec)
        digest = effect_digest(config, tensors, report.irrelevant_fields, report.irrelevant_tensors)
        image = pack(forms, self._spec, self.target.adapter_dtype)
        write_image(Path(job.image_path), image)
        base_model = config.get("base_model_name_or_path")
        return Prepared(
            effect_digest=digest,
            num_bytes=image.num_bytes,
            base_model=base_model if isinstance(base_model, str) and base_model else None,
            report={**report.to_json(), "device_bytes": image.num_bytes, "device_dtype": self.target.adapter_dtype},
        )


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json as it is, objects in file order. Raises AdapterRefused."""
    num_bytes = path.stat().st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise _bad_config(f"has {num_bytes} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=_unique_fields)
    except (ValueError, RecursionError) as error:
        raise _bad_config(f"is not JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise _bad_config("does not hold a JSON object")
    return config


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _bad_config("holds a field twice, so what it means cannot be known")
    return fields


def _bad_config(what: str) -> AdapterRefused:
    return AdapterRefused(f"{CONFIG_FILE} {what}. Save the adapter again.", code="malformed_adapter")
