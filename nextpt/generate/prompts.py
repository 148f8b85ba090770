"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path

from nextpt.base.errors import UserError


def read_prompts(path: Path) -> dict[str, str]:
    """Where it stands ("FILE, line 3") -> prompt. *.jsonl: objects with a key `prompt`.

    *.txt: each line is one, without its end.

    An empty line of a .txt is the empty prompt; of a .jsonl it is passed over. Raises UserError
    that names the line.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(
            f"{path}: prompts are read from .jsonl (objects with a key `prompt`) or .txt (one on"
            " each line)"
        )
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from error
    if lines == [""]:
        raise UserError(f"{path} is empty; put one prompt on each line")
    places = {f"{path}, line {number}": line for number, line in enumerate(lines, start=1)}
    if path.suffix == ".txt":
        return {place: line.removesuffix("\r") for place, line in places.items()}
    return {place: _prompt_of(place, line) for place, line in places.items() if line.strip()}


def _prompt_of(place: str, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise UserError(
            f'{place} is not an object with a text under "prompt", such as {{"prompt": "Once"}}'
        )
    return value["prompt"]
