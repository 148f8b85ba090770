"""Corpus that every machine has: the standard library of the running Python.

Two domains: `code`, its sources without docstrings, and `prose`, its docstrings (those of a module
are one document), the language reference that pydoc carries, and text files.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.documents import Document
from nextpt.base.errors import DataPrepError
from nextpt.base.files import atomic_write

# Installed packages are not the standard library. Its own tests are left out because distributions
# do not ship them: so the corpus is nearly the same on every machine.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "test",
    "tests",
    "idle_test",
}
SHORTEST_PROSE = 200  # characters: a module with less says little beyond its signatures


@dataclass
class Collected:
    """Counts of what was written.

    skipped: sources that do not decode or parse (the library tests itself with such files).
    """

    documents: dict[str, int]
    bytes: dict[str, int]
    skipped: int


def collect(output: Path, library: Path | None = None) -> Collected:
    """Write OUTPUT/code.jsonl and OUTPUT/prose.jsonl, one {"id", "text"} a line, in a fixed order.

    Args:
        output: Folder to write to.
        library: Folder of sources; by default the running Python's standard library.

    Raises:
        DataPrepError: When the library has no sources.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    result = Collected({"code": 0, "prose": 0}, {"code": 0, "prose": 0}, 0)
    output.mkdir(parents=True, exist_ok=True)
    # An equal file is kept, because a dataset identifies large inputs by their modification time.
    with (
        atomic_write(output / "code.jsonl", keep_same=True) as code,
        atomic_write(output / "prose.jsonl", keep_same=True) as prose,
    ):
        for domain, document in _documents(library, result):
            (code if domain == "code" else prose).write(
                json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n"
            )
            result.documents[domain] += 1
            result.bytes[domain] += len(document.text.encode())
        if not result.documents["code"]:
            raise DataPrepError(
                f"{library} holds no Python sources; is this Python installed with its standard"
                " library?"
            )
    return result


def _documents(library: Path, result: Collected) -> Iterator[tuple[str, Document]]:
    for path in sorted(p for p in library.rglob("*") if p.suffix in (".py", ".txt", ".rst")):
        name = path.relative_to(library).as_posix()
        if SKIPPED_FOLDERS.intersection(Path(name).parts) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            text.encode()
            if path.suffix != ".py":
                if len(text) >= SHORTEST_PROSE:
                    yield "prose", Document(name, text)
                continue
            if name == "pydoc_data/topics.py":
                yield from (("prose", d) for d in _topics(text, name))
                continue
            docstrings, stripped = _separate(text)
        except (UnicodeError, SyntaxError, ValueError, RecursionError):
            result.skipped += 1
            continue
        if stripped.strip():
            yield "code", Document(name, stripped)
        documentation = "\n\n".join(docstrings) + "\n"
        if len(documentation) >= SHORTEST_PROSE:
            yield "prose", Document(f"{name}:docstrings", documentation)


def _topics(text: str, name: str) -> Iterator[Document]:
    """Yield the language reference, a literal dict of topic -> text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Dict):
            for topic, body in ast.literal_eval(node).items():
                yield Document(f"{name}:{topic}", body)


def _separate(source: str) -> tuple[list[str], str]:
    """(docstrings in order, source without them). Lines and comments stay as they are."""
    docstrings: list[str] = []
    lines = source.splitlines(keepends=True)

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                first = node.body[0]
                docstrings.append(docstring)
                _cut(
                    lines,
                    first.lineno - 1,
                    first.end_lineno or first.lineno,
                    keep_body=len(node.body) == 1,
                )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return docstrings, "".join(lines)


def _cut(lines: list[str], first: int, stop: int, *, keep_body: bool) -> None:
    """Cut out a docstring that has its lines to itself; a body of nothing else keeps `...`."""
    head = lines[first]
    indent = head[: len(head) - len(head.lstrip())]
    if not head.lstrip().lstrip("rRuU").startswith(('"', "'")):
        return  # it shares its line with other code: left where it is
    for number in range(first, stop):
        lines[number] = ""
    if keep_body and indent:
        lines[first] = f"{indent}...\n"
