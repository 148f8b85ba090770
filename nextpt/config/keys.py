"""Config keys: every dotted key of the schema with its metadata, and flattening of values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from nextpt.config.reader import INDEX
from nextpt.config.schema import Config
from nextpt.config.section import KeyMetadata, Section, metadata_of

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """A key of the schema.

    Attributes:
        name: Dotted name, such as model.depth; data.stages.N.steps below a list.
        field: Type, default, bounds and description.
        metadata: What `nextpt.config.section.key` declared.
        may_change: Whether a resumed run may change it, by its own metadata or a section's.
        is_section: Whether it holds a section, and no value of its own.
    """

    name: str
    field: FieldInfo
    metadata: KeyMetadata
    may_change: bool
    is_section: bool

    @property
    def leaf(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """Name of the section; empty for a section of the run itself."""
        return self.name.rpartition(".")[0]

    @property
    def bound(self) -> str | None:
        """Bound of the value, such as ">= 1 and <= 64"; None where the type is the only bound."""
        parts = [
            f"{symbol} {bound}"
            for item in self.field.metadata
            for name, symbol in _BOUNDS.items()
            if (bound := getattr(item, name, None)) is not None
        ]
        kinds = list(_kinds(self.field.annotation))
        choices = [choice for kind in kinds for choice in _choices(kind)]
        if choices:
            others = ", or a step" if int in kinds else ""
            parts.append(f"one of {', '.join(map(str, choices))}{others}")
        return " and ".join(parts) or None

    @property
    def default(self) -> str:
        """Default value, or "required"."""
        if self.field.is_required():
            return "required"
        value = self.field.get_default(call_default_factory=True, validated_data={})
        return f"default {value}"


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key of a run, sections included, in the order of the schema."""
    return tuple(_walk(Config, "", False))


def describe_keys() -> list[Key]:
    """Every key that holds a value."""
    return [key for key in all_keys() if not key.is_section]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _walk(section: type[Section], prefix: str, may_change: bool) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        metadata = metadata_of(field)
        changeable = may_change or metadata.may_change
        kinds = list(_kinds(field.annotation))
        below = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        yield Key(prefix + name, field, metadata, changeable, below is not None)
        if below:
            yield from _walk(below, f"{prefix}{name}.", changeable)
        for kind in kinds:
            item = get_args(kind)[0] if get_origin(kind) is list else None
            if isinstance(item, type) and issubclass(item, Section):
                yield from _walk(item, f"{prefix}{name}.{INDEX}.", changeable)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Members of a union, or the type itself."""
    if get_origin(annotation) in (list, dict, tuple, Literal) or not get_args(annotation):
        yield annotation
    else:
        yield from get_args(annotation)


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()
