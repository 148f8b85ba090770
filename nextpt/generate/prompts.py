"""Prompts read from a .txt or .jsonl file."""

from __future__ import annotations

import json
from pathlib import Path

from nextpt.base.errors import UserError


def read_prompts(path: Path) -> dict[str, str]:
    """Read prompts from a file.

    Args:
        path: *.jsonl: one object with a key `prompt` on each line; empty lines are skipped. *.txt:
            one prompt on each line; an empty line is the empty prompt.

    Returns:
        Location ("FILE, line 3") -> prompt.

    Raises:
        UserError: The file cannot be read, or a line is no prompt; names the line.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(
            f"{path}: prompts are read from .jsonl (objects with a key `prompt`) or .txt (one on"
            " each line)"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at byte {error.start:,}") from error
    if lines == [""]:
        raise UserError(f"{path} is empty; put one prompt on each line")
    by_location = {f"{path}, line {number}": line for number, line in enumerate(lines, start=1)}
    if path.suffix == ".txt":
        return {location: line.removesuffix("\r") for location, line in by_location.items()}
    return {
        location: _parse_prompt(location, line)
        for location, line in by_location.items()
        if line.strip()
    }


def _parse_prompt(location: str, line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{location} is not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str):
        raise UserError(
            f'{location} is not an object with a text under "prompt", such as {{"prompt": "Once"}}'
        )
    return prompt
