"""Base class of the config sections, and the metadata that every key carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class KeyMetadata:
    """What a key carries beside its type, default, bound and description.

    Attributes:
        unit: Unit of the value, such as "tokens" or "seconds"; None for a value without one.
        may_change: Whether a resumed run may change the key, or any key below it.
        deprecated: Earlier names of the key in its section. They are still read, with a warning.
        aliases: Names that other frameworks use for it, in any section; for error hints only.
    """

    unit: str | None = None
    may_change: bool = False
    deprecated: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, and values cannot be assigned."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def key(
    default: Any = ...,
    *,
    description: str,
    unit: str | None = None,
    may_change: bool = False,
    deprecated: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
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
        **bounds: Bounds and factory as `pydantic.Field` takes them: gt, ge, lt, le, pattern, ...

    Returns:
        The pydantic field.
    """
    metadata: dict[str, Any] = {
        "unit": unit,
        "may_change": may_change,
        "deprecated": list(deprecated),
        "aliases": list(aliases),
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
    )
