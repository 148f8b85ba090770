"""Texts to evaluate on (held-out documents, text files), and the JSON file of a result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import read_documents
from data_prep.inputs import format_of
from data_prep.tokenizer import Tokenizer
from nextpt.base.errors import DataError, DataPrepError
from nextpt.base.files import atomic_write, canonical_json


def validation_folder(data: Path) -> Path:
    """Folder of the held-out documents of a dataset; older datasets have another name for it."""
    folder, old = data / "validation_text", data / "heldout_text"
    return old if old.is_dir() and not folder.is_dir() else folder


def validation_texts(data: Path) -> dict[str, list[str]]:
    """Read the held-out documents of a dataset folder.

    Returns:
        Domain -> texts; domains without documents are left out.

    Raises:
        DataError: There are none, or they cannot be read.
    """
    folder = validation_folder(data)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(
            f"{data} has no {folder.name}/*.jsonl to evaluate on; prepare it, or name another"
            " folder with --data"
        )
    try:
        texts_of = {file.stem: _read_jsonl(file) for file in files}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read: {error}; prepare the data again") from error
    if not any(texts_of.values()):
        raise DataError(
            f"{data} holds no held-out documents; prepare it with a larger --validation-fraction"
        )
    return {domain: texts for domain, texts in texts_of.items() if texts}


def _read_jsonl(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def text_files(paths: Sequence[Path], text_field: str = "text") -> dict[str, list[str]]:
    """Read files: the records of JSON lines and Parquet, as `nextpt prep` reads them, else UTF-8.

    Args:
        paths: The files.
        text_field: Key of the text in a record.

    Returns:
        Name -> texts, one of a file without records; files of the same name go by their paths.

    Raises:
        DataError: A file cannot be read, is no UTF-8, or is empty.
    """
    names = [
        path.name if sum(other.name == path.name for other in paths) == 1 else str(path)
        for path in paths
    ]
    return {name: _read(path, text_field) for name, path in zip(names, paths, strict=True)}


def _read(path: Path, text_field: str) -> list[str]:
    if format_of(path.name) in (None, ".txt"):
        return [_read_text(path)]
    texts = [document.text for document in read_documents(path, text_field) if document.text]
    if not texts:
        raise DataError(f"{path} holds no text; there is nothing to score")
    return texts


def _read_text(path: Path) -> str:
    try:
        # Bytes as they are: line ends are not translated
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    if not text:
        raise DataError(f"{path} is empty; there is nothing to score")
    return text


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode a document for scoring.

    Returns:
        [start] + tokens + [end], and the UTF-8 bytes that each of them but the first stands for.

    Raises:
        DataError: The tokenizer cannot encode the text.
    """
    try:
        ids, sizes = tokenizer.encode_with_bytes(text)
    except DataPrepError as error:
        raise DataError(f"a document cannot be scored: {error}") from None
    return np.concatenate(([tokenizer.start_id], ids, [tokenizer.end_id])), sizes


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write the result of an evaluation as JSON. Raises DataError."""
    try:
        with atomic_write(path) as file:
            file.write(canonical_json(result))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
