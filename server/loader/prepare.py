"""From the files of one adapter to its packed image: read, check, decode, pack, digest."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from adapters_store.errors import InvalidHeader
from adapters_store.staging import CONFIG_FILE
from peft_core.errors import AdapterError
from peft_core.image import DTYPES, image_key, pack, write_image
from peft_core.methods import check, decode
from peft_core.spec import BaseModelSpec
from peft_core.traits import traits_of
from server.loader.adapter_tensors import AdapterTensors
from server.loader.added_tokens import added_tokens
from server.loader.base_weights import BaseFiles
from server.loader.effect import effect_digest
from server.loader.errors import AdapterRefused
from server.loader.job import PackingTarget, Prepared, PrepareJob
from server.loader.patience import PatienceLost, at_most
from server.loader.strength import CHANGES_NOTHING, changes_nothing

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 1024 * 1024
CHECK_SECONDS = 3.0  # of processor time; an honest config takes milliseconds


class Packer:
    """Prepares adapters for one base and one dtype. Holds no model, at most while an adapter needs its weights."""

    def __init__(self, target: PackingTarget) -> None:
        self.target = target
        self._spec = BaseModelSpec.from_json(target.spec)
        self._base: BaseFiles | None = None
        if target.base_directory:
            self._base = BaseFiles(Path(target.base_directory), self._spec, DTYPES[target.base_dtype])

    @property
    def variant(self) -> str:
        """Names what images are packed for: base, dtypes and the packer itself."""
        return image_key(f"on {self.target.base_dtype}", self._spec.fingerprint, self.target.adapter_dtype)[:16]

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
            raise AdapterRefused(f"the weights: {error}", code=error.code, tensor=error.tensor) from error
        except PatienceLost as error:
            raise AdapterRefused(
                f"checking the adapter's config took longer than {CHECK_SECONDS:.0f} s and was given up. Look for a "
                "pattern in it that cannot be matched in reasonable time.",
                code="check_timed_out",
            ) from error
        except OSError as error:
            raise AdapterRefused(f"a file of the adapter cannot be read: {error}", code="unreadable") from error
        except Exception as error:
            logger.exception("an adapter failed in a way that no decoder foresaw")
            raise AdapterRefused(
                f"the adapter cannot be decoded ({type(error).__name__}: {error}). This is a gap in the decoder; "
                "please report it with the adapter's config.",
                code="decoder_failed",
            ) from error
        finally:
            if self._base is not None:
                self._base.release()

    def _prepare(self, job: PrepareJob) -> Prepared:
        config = read_config(Path(job.files[CONFIG_FILE]))
        tensors = AdapterTensors(job.files)
        with at_most(CHECK_SECONDS):
            check(config, tensors.header, self._spec, max_dense_bytes=self.target.max_dense_bytes)
        forms, report = decode(config, tensors, self._spec, self._base, max_dense_bytes=self.target.max_dense_bytes)
        digest = effect_digest(config, tensors, report.irrelevant_fields, report.irrelevant_tensors)
        image = pack(forms, self._spec, self.target.adapter_dtype)
        write_image(Path(job.image_path), image)
        told = {
            **report.to_json(),
            "device_bytes": image.num_bytes,
            "device_dtype": self.target.adapter_dtype,
            "traits": traits_of(forms).to_json(),
        }
        added = added_tokens(job.files, self.target.base_directory)
        if added.tokens:
            told["added_tokens"] = [list(token) for token in added.tokens]
        told["warnings"] = [*told["warnings"], *added.warnings]
        if changes_nothing(forms):
            told["warnings"] = [*told["warnings"], CHANGES_NOTHING]
        return Prepared(digest, image.num_bytes, _base_model(config), told)


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json as it is, objects in file order. Raises AdapterRefused."""
    num_bytes = path.stat().st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise _bad_config(f"has {num_bytes} bytes; the limit is {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=_unique_fields, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _bad_config(f"is not JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise _bad_config("does not hold a JSON object")
    return config


def _base_model(config: Mapping[str, Any]) -> str | None:
    """The base as the adapter calls it, in either of the two ways."""
    names = (config.get("base_model_name_or_path"), config.get("model_name"))
    return next((name for name in names if isinstance(name, str) and name), None)


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _bad_config("holds a field twice, so what it means cannot be known")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise _bad_config(f"holds {name}, which is no number of JSON")


def _bad_config(what: str) -> AdapterRefused:
    return AdapterRefused(f"{CONFIG_FILE} {what}. Save the adapter again.", code="malformed_adapter")
