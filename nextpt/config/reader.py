"""YAML reader: decimal numbers only, and text as it is written where the schema has text.

YAML 1.1 reads 010 as 8, 1:30 as 90 and a run called 123 as a number. Here a number is decimal, and
a key that holds text takes what is written. Keys of mappings are always text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from yaml import MappingNode, Node, SafeLoader, ScalarNode, SequenceNode
from yaml.constructor import ConstructorError

from nextpt.config.section import metadata_of

INDEX = "N"  # in the name of a key below a list
_TAG = "tag:yaml.org,2002:"
_NULLS = ("", "~", "null", "Null", "NULL")
_INTEGER = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def text_keys(model: type[BaseModel]) -> frozenset[str]:
    """Dotted names of the keys of a schema that hold text or a path, their old names included."""
    return frozenset(_text_keys(model, ""))


def _text_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in model.model_fields.items():
        for name in (key, *metadata_of(field).deprecated):
            yield from _text_in(field.annotation, prefix + name)


def _text_in(annotation: Any, name: str) -> Iterator[str]:
    if annotation in (str, Path):
        yield name
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from _text_keys(annotation, f"{name}.")
    elif get_origin(annotation) in (list, tuple):
        for item in get_args(annotation):
            yield from _text_in(item, f"{name}.{INDEX}")
    elif get_origin(annotation) is not dict:
        for kind in get_args(annotation):  # members of a union
            yield from _text_in(kind, name)


def read_yaml(text: str, text_names: frozenset[str] = frozenset(), name: str = "") -> Any:
    """Read a YAML document.

    Args:
        text: The document.
        text_names: Keys whose values are text, as `text_keys` names them.
        name: Dotted name of the key that the document is the value of; empty for a whole file.

    Raises:
        yaml.YAMLError: The text is not YAML, or a key occurs twice.
        RecursionError: It is nested too deeply, or contains itself.
    """
    loader = SafeLoader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, name, text_names)
    finally:
        loader.dispose()


def read_override(text: str, name: str, text_names: frozenset[str]) -> Any:
    """Read the value of `name=text`: the text itself for a key that holds text, else YAML."""
    generic = re.sub(r"(?<=\.)\d+(?=\.|$)", INDEX, name)
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if generic in text_names and not is_quoted:
        return None if text in _NULLS else text
    return read_yaml(text, text_names, generic)


def _value(loader: SafeLoader, node: Node, name: str, text_names: frozenset[str]) -> Any:
    if not node.tag.startswith(_TAG):
        raise ConstructorError(None, None, f"unknown tag {node.tag!r}", node.start_mark)
    if isinstance(node, SequenceNode):
        below = f"{name}.{INDEX}"
        return [_value(loader, item, below, text_names) for item in node.value]
    if isinstance(node, MappingNode):
        _refuse_duplicates(node)
        loader.flatten_mapping(node)  # the merge key <<
        below = f"{name}." if name else ""
        return {
            _key(key): _value(loader, item, below + _key(key), text_names)
            for key, item in node.value
        }
    assert isinstance(node, ScalarNode)  # the third of the kinds of nodes
    return _scalar(node, name in text_names)


def _scalar(node: ScalarNode, is_text: bool) -> Any:
    text: str = node.value
    kind = node.tag.removeprefix(_TAG)
    if kind == "null":
        return None
    if is_text or node.style is not None:
        return text
    if kind == "bool":
        return SafeLoader.bool_values[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text


def _key(node: Node) -> str:
    if not isinstance(node, ScalarNode):
        raise ConstructorError(None, None, "a key is not text", node.start_mark)
    return str(node.value)


def _refuse_duplicates(node: MappingNode) -> None:
    keys: set[str] = set()
    for key, _ in node.value:
        if key.tag == f"{_TAG}merge":
            continue
        if _key(key) in keys:
            raise ConstructorError(None, None, f"duplicate key {_key(key)}", key.start_mark)
        keys.add(_key(key))
