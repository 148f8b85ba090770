"""Rules for source files: columns, titles, assertions."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 100
ROOMS = ("kernels", "data_prep", "nextpt", "launcher")
SOURCES = sorted(
    path
    for folder in (*ROOMS, "tests", "bench", "scripts")
    for pattern in ("*.py", "*.sbatch", "*.sh")
    for path in (ROOT / folder).rglob(pattern)
    if "fixtures" not in path.parts
)
MODULES = [
    path for path in SOURCES if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ROOMS
]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_line_is_longer_than_100_columns(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS] == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_begins_with_a_title_of_one_line(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    title = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
    assert title and first.removeprefix("r").startswith('"""' + title) and len(first) <= COLUMNS


# Invariants of our own code, beside those that narrow a type (`is not None`, `isinstance`). What a
# user or a file can cause raises a UserError: `python -O` removes assertions.
INVARIANTS = {
    "data_prep/export.py": 1,
    "data_prep/group.py": 2,
    "nextpt/checkpoint/format.py": 1,
    "nextpt/checkpoint/manager.py": 1,
    "nextpt/data/batch.py": 1,
    "nextpt/data/mixture.py": 1,
    "nextpt/generate/decoding.py": 1,
    "nextpt/generate/stopping.py": 1,
    "nextpt/optim/spec.py": 1,
}


@pytest.mark.thorough
def test_assertions_are_for_invariants_of_our_own() -> None:
    counts = Counter()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert) and "bench" not in path.parts:
                test = ast.unparse(node.test)
                narrows = test.endswith(" is not None") or test.startswith("isinstance(")
                counts[relative(path)] += not narrows
    assert +counts == INVARIANTS, "a new assertion: is it an invariant that no input can break?"
