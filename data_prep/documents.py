"""Documents of a corpus as one stream, where one process is enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.inputs import find_files
from data_prep.records import Bad, Fields, describe_bad, read_part, whole
from nextpt.base.errors import DataPrepError


@dataclass(frozen=True)
class Document:
    """One text; `id` says where it comes from."""

    id: str
    text: str


def read_documents(
    location: str | Path, text_field: str = "text", id_field: str | None = "id"
) -> Iterator[Document]:
    """Yield the documents of a file, folder, glob or URI, in a fixed order.

    Raises:
        DataPrepError: With file and position of a bad record.
    """
    for file in find_files(location):
        for record in read_part(whole(file), Fields(text_field, id_field)):
            if isinstance(record, Bad):
                raise DataPrepError(describe_bad(file, record))
            where = (
                f"{file.uri}, {'row' if file.format == '.parquet' else 'byte'} {record.position}"
            )
            yield Document(record.id or where, record.text)
