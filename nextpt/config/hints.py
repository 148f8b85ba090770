"""Config errors: unknown keys lead to the key that is meant, also from other frameworks' names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nextpt.config.keys import Key, all_keys
from nextpt.config.reader import INDEX

# Names of what is no key here: computed, or given in another way.
_ACCUMULATION = "it is computed: train.global_batch_size / (train.micro_batch_size x ranks)"
_RANKS = "the launcher sets it: nextpt train --ranks N"
COMPUTED = {
    "gradient_accumulation_steps": _ACCUMULATION,
    "gradient_accumulation": _ACCUMULATION,
    "grad_accumulation_steps": _ACCUMULATION,
    "grad_accum_steps": _ACCUMULATION,
    "grad_accum": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "accumulation_steps": _ACCUMULATION,
    "world_size": _RANKS,
    "num_gpus": _RANKS,
    "n_gpus": _RANKS,
    "data_parallel_size": _RANKS,
    "wandb_api_key": "keys are never in a config: set WANDB_API_KEY or call `wandb login`",
    "api_key": "keys are never in a config: set WANDB_API_KEY or call `wandb login`",
}
# Names that stand for one value of a key.
VALUES = {
    "bf16": "train.precision=bf16",
    "bfloat16": "train.precision=bf16",
    "use_bf16": "train.precision=bf16",
    "fp32": "train.precision=fp32",
    "float32": "train.precision=fp32",
    "swiglu": "model.ffn=swiglu",
    "gelu": "model.ffn=gelu",
    "relu2": "model.ffn=relu2",
    "relu_squared": "model.ffn=relu2",
    "squared_relu": "model.ffn=relu2",
    "cosine": "schedule.kind=cosine",
    "wsd": "schedule.kind=wsd",
}
_MAX_HINTS = 3
_NEAR_IN_SECTION, _NEAR_ANYWHERE = 0.6, 0.75  # similarity of difflib, 0 to 1
# Parts of an error's location that pydantic adds for the members of a union.
_TYPE_PART = re.compile(r"(?:int|float|bool|str|none|tuple|[a-z]+\[.*\])")


def explain(error: Mapping[str, Any]) -> str:
    """One pydantic error as one phrase: key, value, what was expected, what to do."""
    key = ".".join(str(part) for part in error["loc"] if not _TYPE_PART.fullmatch(str(part)))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}; {hint(key)}"
    if error["type"] == "missing":
        described = next((k for k in all_keys() if k.name == _generic(key)[0]), None)
        meaning = f" ({described.field.description})" if described else ""
        return f"key {key} is missing{meaning}"
    message: str = error["msg"].removeprefix("Value error, ")
    if key and error["type"] != "value_error":
        value = error["input"]
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        return f"{key} = {shown}: {message[0].lower()}{message[1:]}"
    return message


def hint(unknown: str) -> str:
    """Advice for an unknown dotted key.

    Keys of the same name in other sections come first, then keys that other frameworks call so,
    then names that are spelled alike.
    """
    generic, indices = _generic(unknown)
    parent, _, leaf = generic.rpartition(".")
    leaf = leaf.lower().replace("-", "_")
    if leaf in COMPUTED:
        return COMPUTED[leaf]
    if leaf in VALUES:
        return f"did you mean {VALUES[leaf]}?"
    matches = _same_name(leaf, parent) or _same_meaning(leaf, parent)
    if not matches:
        matches = _similar(leaf, parent)
    if matches:
        names = [_specific(key.name, indices) for key in matches[:_MAX_HINTS]]
        return f"did you mean {' or '.join(names)}?"
    section = [key.leaf for key in all_keys() if key.parent == parent]
    if parent and section:
        return f"the keys of {parent} are {', '.join(section)}"
    sections = [key.name for key in all_keys() if not key.parent]
    return f"the sections are {', '.join(sections)}; `nextpt config keys` lists all keys"


def _same_name(leaf: str, parent: str) -> list[Key]:
    """Keys of this name in other sections, then those that other frameworks call so.

    A key of a section within a section is left out where the outer section has the name.
    """
    names = {key.name for key in all_keys()}
    matches = [
        key
        for key in all_keys()
        if key.leaf == leaf
        and key.parent != parent
        and f"{key.parent.rpartition('.')[0]}.{leaf}" not in names
    ]
    below_lists = [key for key in matches if f".{INDEX}." in key.name]
    matches = [key for key in matches if key not in below_lists] or below_lists
    if not matches:
        return []
    return _unique([*matches, *_same_meaning(leaf, parent)])


def _same_meaning(leaf: str, parent: str) -> list[Key]:
    """Keys that other frameworks, or earlier versions, call so; those of the section first."""
    matches = [key for key in all_keys() if leaf in key.metadata.aliases + key.metadata.deprecated]
    return sorted(matches, key=lambda key: key.parent != parent)


def _similar(leaf: str, parent: str) -> list[Key]:
    """The key whose name or alias is spelled most alike, in the section or else anywhere."""
    for keys, cutoff in (
        ([key for key in all_keys() if key.parent == parent], _NEAR_IN_SECTION),
        (list(all_keys()), _NEAR_ANYWHERE),
    ):
        by_name: dict[str, Key] = {}
        for key in keys:
            for name in (key.leaf, *key.metadata.aliases, *key.metadata.deprecated):
                by_name.setdefault(name, key)
        # Own names before aliases: they are what the user most likely misspelled.
        for names in ([key.leaf for key in keys], list(by_name)):
            nearest = difflib.get_close_matches(leaf, names, 1, cutoff)
            if nearest:
                return [by_name[nearest[0]]]
    return []


def _unique(keys: Iterable[Key]) -> list[Key]:
    return list({key.name: key for key in keys}.values())


def _generic(name: str) -> tuple[str, list[str]]:
    """(name with INDEX in the place of list indices, the indices)."""
    indices = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return re.sub(r"(?<=\.)\d+(?=\.)", INDEX, name), indices


def _specific(name: str, indices: list[str]) -> str:
    """The name with its list indices put back."""
    for index in indices:
        name = name.replace(f".{INDEX}.", f".{index}.", 1)
    return name
