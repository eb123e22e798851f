"""Used, irrelevant or refused: the account of everything that an adapter brings along.

A decoder takes what it understands off a ledger. What is left in the end was understood by nobody, and the adapter is
refused for it by name: nothing is accepted and ignored.

Running example: {"r": 8, "lora_dropout": 0.1, "rotate": 3}
    ledger.use("r", 8)                                    -> 8
    ledger.set_aside({"lora_dropout": "training only"})   -> ledger.irrelevant == {"lora_dropout": "training only"}
    ledger.close()                                        -> UnsupportedAdapter: field "rotate" = 3 is unknown ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from peft_core.errors import MalformedAdapter, UnsupportedAdapter, shown


class ConfigLedger:
    """The fields of one adapter_config.json; each is taken once."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._left = dict(config)
        self.irrelevant: dict[str, str] = {}  # field -> why it does not matter

    def use(self, field: str, default: Any = None) -> Any:
        """Take a field; absent and null both mean the default."""
        value = self._left.pop(field, None)
        return default if value is None else value

    def use_flag(self, field: str, default: bool = False) -> bool:
        """Take a field that is true or false; absent means the default."""
        value = self.use(field, default)
        return value if isinstance(value, bool) else self._wrong_type(field, value, "true or false")

    def use_start(self, *words: str, default: bool | str = True) -> bool | str:
        """Take `init_weights`, how training began: true, false or one of `words`; absent means the default."""
        start: bool | str = self.use("init_weights", default)
        if not isinstance(start, bool) and start not in words:
            known = ", ".join(["true", "false", *(f'"{word}"' for word in words)])
            refuse("init_weights", start, f"known here: {known}. Correct adapter_config.json.")
        return start

    def use_count(self, field: str) -> int | None:
        """Take a field that is an integer above 0; None where it is absent."""
        value = self.use(field)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        return self._wrong_type(field, value, "an integer above 0")

    def use_size(self, field: str) -> int | None:
        """Take a field that is an integer of at least 0, where 0 may have a meaning; None where it is absent."""
        value = self.use(field)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        return self._wrong_type(field, value, "an integer of at least 0")

    def use_number(self, field: str, default: float) -> float:
        """Take a field that is a finite number."""
        value = self.use(field, default)
        return float(value) if is_number(value) else self._wrong_type(field, value, "a finite number")

    def use_names(self, field: str) -> str | tuple[str, ...]:
        """Take a field that is a pattern or a list of names; absent and empty both give ()."""
        value = self.use(field, ())
        if isinstance(value, str):
            return value or ()
        if isinstance(value, list | tuple | set) and all(isinstance(name, str) and name for name in value):
            return tuple(value)
        return self._wrong_type(field, value, "a string or a list of strings")

    def use_list(self, field: str) -> tuple[str, ...]:
        """As `use_names`, where a string is the only name of its list."""
        names = self.use_names(field)
        return (names,) if isinstance(names, str) else names

    def use_pattern_values(self, field: str) -> dict[str, float]:
        """Take a mapping of patterns to finite numbers, in file order; absent and null give {}."""
        value = self.use(field, {})
        if isinstance(value, dict) and all(is_number(number) for number in value.values()):
            return dict(value)
        return self._wrong_type(field, value, "an object of finite numbers")

    def set_aside(self, reasons: Mapping[str, str]) -> None:
        """Take fields that cannot change what the adapter computes, and remember why."""
        for field, reason in reasons.items():
            if field in self._left:
                del self._left[field]
                self.irrelevant[field] = reason

    def refuse_unless_off(self, sentences: Mapping[str, str], *, empty_is_off: bool = True) -> None:
        """Take fields that are not served unless they are switched off.

        Args:
            empty_is_off: False where an empty object switches a feature on with its defaults.

        Raises:
            UnsupportedAdapter: one of them is on; the message ends in its sentence.
        """
        for field, sentence in sentences.items():
            value = self._left.pop(field, None)
            if value is not None and value is not False and not (empty_is_off and is_off(value)):
                refuse(field, value, sentence)

    def close(self) -> None:
        """Raises UnsupportedAdapter for the first field left over, unless all that are left are switched off."""
        for field, value in self._left.items():
            if is_off(value):
                self.irrelevant[field] = "unknown, and switched off"
                continue
            refuse(
                field,
                value,
                "this field is unknown here and may change what the adapter computes. "
                "Remove it from adapter_config.json if it does not.",
            )

    def _wrong_type(self, field: str, value: object, expected: str) -> NoReturn:
        raise MalformedAdapter(
            f'field "{field}" = {shown(value)}; expected {expected}. Correct adapter_config.json.',
            field=field,
            value=value,
        )


def refuse(field: str, value: object, sentence: str) -> NoReturn:
    """Raises UnsupportedAdapter naming the field and its value."""
    raise UnsupportedAdapter(f'field "{field}" = {shown(value)}: {sentence}', field=field, value=value)


def is_off(value: object) -> bool:
    """Whether a value switches its field off. A number never does: 0 may mean anything."""
    return value is None or value is False or value in ("", [], {}, ())


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1023
