"""Base class of the config sections, and the metadata that every key carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from nextpt.base.errors import UserError
from nextpt.base.files import expand_home

LARGEST = 2**63 - 1  # of a whole number: what torch, numpy and JSON readers hold


@dataclass(frozen=True)
class KeyMetadata:
    """What a key carries beside its type, default, bound and description.

    Attributes:
        unit: Unit of the value, such as "tokens" or "seconds"; None for a value without one.
        may_change: Whether a resumed run may change the key, or any key below it.
        deprecated: Earlier names of the key in its section. They are still read, with a warning.
        aliases: Names that other frameworks use for it, in any section; for error hints only.
        is_path: Whether it is a path, in which ~ is the home folder.
    """

    unit: str | None = None
    may_change: bool = False
    deprecated: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    is_path: bool = False


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot be assigned.

    Numbers are finite, true and false are no numbers, and ~ in a path is the home folder.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_raw(cls, value: Any, info: ValidationInfo) -> Any:
        """Check what pydantic would convert without a word."""
        field = cls.model_fields[info.field_name or ""]
        kinds = set(_types(field.annotation))
        if any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds):
            return value  # checked key by key
        for item in value.values() if isinstance(value, dict) else _items(value):
            if isinstance(item, bool) and bool not in kinds:
                raise PydanticCustomError(
                    "no_boolean", "{expected}", {"expected": _expected(kinds)}
                )
            if isinstance(item, int) and abs(item) > LARGEST:
                raise PydanticCustomError("too_large", "must be at most 2^63 - 1")
        if metadata_of(field).is_path and isinstance(value, str):
            try:
                return expand_home(value)
            except UserError as error:
                raise PydanticCustomError("no_home", "{problem}", {"problem": str(error)}) from None
        return value


def key(
    default: Any = ...,
    *,
    description: str,
    unit: str | None = None,
    may_change: bool = False,
    deprecated: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    is_path: bool = False,
    **bounds: Any,
) -> Any:
    """Declare a key of a section.

    Args:
        default: Value of the key unless it is set; without one the key is required.
        description: Meaning of the key, one phrase.
        unit: See `KeyMetadata`.
        may_change: See `KeyMetadata`.
        deprecated: See `KeyMetadata`.
        aliases: See `KeyMetadata`.
        is_path: See `KeyMetadata`.
        **bounds: Bounds and factory as `pydantic.Field` takes them: gt, ge, lt, le, pattern, ...

    Returns:
        The pydantic field.
    """
    metadata: dict[str, Any] = {
        "unit": unit,
        "may_change": may_change,
        "deprecated": list(deprecated),
        "aliases": list(aliases),
        "is_path": is_path,
    }
    return Field(default, description=description, json_schema_extra=metadata, **bounds)


def metadata_of(field: FieldInfo) -> KeyMetadata:
    """Metadata of a field that `key` declared; empty for any other field."""
    extra: dict[str, Any] = (
        field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    )
    return KeyMetadata(
        extra.get("unit"),
        extra.get("may_change", False),
        tuple(extra.get("deprecated", ())),
        tuple(extra.get("aliases", ())),
        extra.get("is_path", False),
    )


def _types(annotation: Any) -> Iterator[Any]:
    """The type, and those that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _expected(kinds: set[Any]) -> str:
    if kinds & {int, float} or any(isinstance(kind, int) for kind in kinds):
        return "expected a number, not true or false"
    return "expected text, not true or false; write it in quotes"
