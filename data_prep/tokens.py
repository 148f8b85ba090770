"""Tokens of one unit on disk, between tokenizing and packing: WORK/tok/NNNNNN.tok.

    tokens      uint16 or uint32, all documents one after another, without start and end
    sizes       uint32, only where byte_counts is "column": bytes of every token and of every
                document's end
    documents   DOCUMENT records
    footer      JSON: counts, and the sizes of the sections
    tail        8 bytes: length of the footer; 8 bytes: MAGIC

The file takes its name when it is whole, so its existence says that the unit is done.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from nextpt.base.errors import DataPrepError
from nextpt.base.files import open_exclusively, temporary_path

MAGIC = b"nextpt-2"
DOCUMENT = np.dtype(
    [
        ("text_hash", "<u8"),
        ("id_hash", "<u8"),  # id_hash 0: the record has no id
        # Where its record is: data_prep.records.Record.position, in this part of the unit
        ("position", "<u8"),
        ("part", "<u4"),
        ("tokens", "<u4"),
        ("bytes", "<u4"),
        ("domain", "<u2"),
        ("validation", "u1"),
    ]
)


class TokensWriter:
    """Writes one .tok file; memory does not grow with it.

    Call `finish`, or `abandon` after a failure.
    """

    def __init__(self, path: Path, dtype: np.dtype, *, sizes: bool) -> None:
        self.path = path
        self._paths = {
            name: temporary_path(path.with_name(f"{path.name}.{name}"))
            for name in ("tokens", "sizes", "documents")
        }
        self._dtype = dtype
        self._has_sizes = sizes
        self._files = {name: open_exclusively(p, "wb") for name, p in self._paths.items()}
        self.count = self.tokens = 0

    def add(self, tokens: np.ndarray, sizes: np.ndarray | None, document: tuple[int, ...]) -> None:
        """Append a document.

        Args:
            tokens: uint32 [n].
            sizes: uint32 [n + 1]; None with byte_counts "table".
            document: Fields of DOCUMENT.
        """
        self._files["tokens"].write(tokens.astype(self._dtype).data)
        if self._has_sizes:
            assert sizes is not None
            self._files["sizes"].write(sizes.astype("<u4").data)
        self._files["documents"].write(np.array(document, dtype=DOCUMENT).tobytes())
        self.count += 1
        self.tokens += len(tokens)

    def finish(self, footer: dict[str, Any]) -> None:
        """Join the sections and give the file its name, durably."""
        for file in self._files.values():
            file.flush()
        sections = {name: path.stat().st_size for name, path in self._paths.items()}
        with open(self._paths["tokens"], "ab") as target:
            for name in ("sizes", "documents"):
                with open(self._paths[name], "rb") as source:
                    shutil.copyfileobj(source, target, 2**22)
            footer |= {
                "dtype": self._dtype.name,
                "sections": sections,
                "documents": self.count,
                "tokens": self.tokens,
            }
            data = json.dumps(footer).encode()
            target.write(data + struct.pack("<Q", len(data)) + MAGIC)
            target.flush()
            os.fsync(target.fileno())
        os.replace(self._paths["tokens"], self.path)
        self.abandon()

    def abandon(self) -> None:
        """Close and remove unfinished files."""
        for name, file in self._files.items():
            file.close()
            self._paths[name].unlink(missing_ok=True)


class TokensFile:
    """Reads one .tok file through a memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.footer = read_footer(path)
        dtype, sections = np.dtype(self.footer["dtype"]), self.footer["sections"]
        data = (
            np.memmap(path, dtype=np.uint8, mode="r")
            if sum(sections.values())
            else np.zeros(0, np.uint8)
        )
        first, second = sections["tokens"], sections["tokens"] + sections["sizes"]
        self.tokens = data[:first].view(dtype)
        self.sizes = data[first:second].view("<u4")
        self.documents = data[second : second + sections["documents"]].view(DOCUMENT)


def read_footer(path: Path) -> dict[str, Any]:
    """Read the footer of a .tok file.

    Raises:
        DataPrepError: When the file is not a whole .tok file.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 16, 0))
            tail = file.read()
            length = struct.unpack("<Q", tail[:8])[0] if tail[8:] == MAGIC else size
            if length + 16 > size:
                raise ValueError("it has no footer")
            file.seek(size - 16 - length)
            footer: dict[str, Any] = json.loads(file.read(length))
            if "passed" in footer:  # written before format version 3
                footer["filtered"] = footer.pop("passed")
            return footer
    except (OSError, ValueError, struct.error) as error:
        raise DataPrepError(
            f"{path} is damaged ({error}); remove it and start again, it will be made anew"
        ) from error
