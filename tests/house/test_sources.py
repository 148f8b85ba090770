"""Rules for source files: columns, titles, names, assertions."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 100
ROOMS = ("kernels", "data_prep", "nextpt", "launcher")
SOURCES = sorted(
    path
    for folder in (*ROOMS, "tests", "bench", "scripts")
    for pattern in ("*.py", "*.sbatch", "*.sh", "*.j2")
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


# Words that say nothing of the thing that they name. A participle is forbidden as a part of a name
# too (`steps_made`); `one` and `each` are not (`one_line`).
VAGUE_NAMES = {"one", "each"}
VAGUE_PARTS = {"made", "told", "heard", "found", "given", "wanted", "taken", "here"}
FIXED_NAMES = {"found_inf"}  # torch's fused AdamW reads this attribute


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of what a module binds.

    Variables, attributes, parameters, functions, classes, aliases of imports and captures of
    patterns.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield name, node.lineno
            case ast.arg(arg=name) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno


def vague_names(source: str) -> list[str]:
    """Names, as name:line, that CONTRIBUTING.md forbids under "How we write"."""
    return [
        f"{name}:{line}"
        for name, line in bound_names(ast.parse(source))
        if name not in FIXED_NAMES
        and (name.strip("_").lower() in VAGUE_NAMES or VAGUE_PARTS & set(name.lower().split("_")))
    ]


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".py"], ids=relative)
def test_names_are_nouns_or_verbs_of_the_domain(path: Path) -> None:
    assert vague_names(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("found = 1", "found"),
        ("class A:\n def f(self): self.made = 1", "made"),
        ("for one in (1, 2): pass", "one"),
        ("total = sum(each for each in (1, 2))", "each"),
        ("def f(x, *, wanted): pass", "wanted"),
        ("lambda taken: 1", "taken"),
        ("def test_a_killed_rank_is_told(): pass", "test_a_killed_rank_is_told"),
        ("class Heard: pass", "Heard"),
        ("steps_made: int = 1", "steps_made"),
        ("if (given := 1): pass", "given"),
        ("with open('x') as here: pass", "here"),
        ("try: pass\nexcept OSError as told: pass", "told"),
        ("import os as found", "found"),
    ],
)
def test_vague_names_are_detected(source: str, name: str) -> None:
    assert [entry.split(":")[0] for entry in vague_names(source)] == [name]


def test_names_with_vague_words_inside_others_are_allowed() -> None:
    assert vague_names("one_line = foundation = phone = where = each_rank = found_inf = 1") == []


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
