"""House rules: imports between rooms, sizes, names, and packages that share our names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Floor of each room, longest name first where one holds another; a room imports only from lower
# floors.
FLOORS = {
    "kernels": 0,
    "nextpt.base": 0,
    "data_prep": 1,
    "nextpt.config": 2,
    "nextpt.events": 3,
    "nextpt.data": 4,
    "nextpt.model": 5,
    "nextpt.parallel": 1,
    "nextpt.optim": 6,
    "nextpt.objective": 6,
    "nextpt.checkpoint": 7,
    "nextpt.job": 8,
    "nextpt.exchange": 8,
    "nextpt.generate": 8,
    "nextpt.evaluate": 9,
    "nextpt.train": 10,
    "nextpt.scaling": 11,
    "nextpt.observe": 11,
    "launcher": 12,
}
SOURCES = sorted(
    p
    for room in ("kernels", "data_prep", "nextpt", "launcher")
    for p in (ROOT / room).rglob("*.py")
)


def room(module: str) -> str | None:
    return next((name for name in FLOORS if module == name or module.startswith(name + ".")), None)


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_the_rooms_have_sources() -> None:
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_rooms_import_only_from_lower_floors(path: Path) -> None:
    own = room(module_of(path))
    for imported in imports(path):
        other = room(imported)
        if own is None or other is None or own == other:
            continue
        assert FLOORS[other] < FLOORS[own], (
            f"{module_of(path)} (floor {FLOORS[own]}) imports {imported} (floor {FLOORS[other]})"
        )


@pytest.mark.thorough
def test_only_one_module_imports_deepspeed_and_one_streaming_and_none_pickle() -> None:
    users = {
        name: {module_of(p) for p in SOURCES for i in imports(p) if i.split(".")[0] == name}
        for name in ("deepspeed", "pickle", "streaming")
    }
    assert users["deepspeed"] == {"nextpt.train.deepspeed_api"} and users["pickle"] == set()
    assert users["streaming"] == {"data_prep.streaming_compat"}


COLLECTIVES = {
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all"),
    *("all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather"),
    *("gather_object", "irecv", "isend", "monitored_barrier", "recv", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
}


def collectives_without_group(path: Path) -> list[str]:
    """Calls of torch.distributed's collectives that name no process group, as name:line."""
    tree = ast.parse(path.read_text())
    modules, functions = {"torch.distributed"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname for a in node.names if a.name == "torch.distributed" and a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            modules |= {a.asname or a.name for a in node.names if a.name == "distributed"}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
            functions |= {a.asname or a.name for a in node.names if a.name in COLLECTIVES}
    unnamed = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(k.arg == "group" for k in node.keywords):
            continue
        called = ast.unparse(node.func)
        module, _, name = called.rpartition(".")
        if called in functions or (module in modules and name in COLLECTIVES):
            unnamed.append(f"{called}:{node.lineno}")
    return unnamed


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_collectives_name_their_group(path: Path) -> None:
    assert collectives_without_group(path) == []


def test_collectives_without_a_group_are_detected(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import torch.distributed as dist\nfrom torch.distributed import barrier\n"
        "dist.all_reduce(x)\nbarrier()\ndist.broadcast(x, 0, group=g)\n"
    )
    assert collectives_without_group(source) == ["dist.all_reduce:3", "barrier:4"]


@pytest.mark.thorough
def test_launcher_files_shadow_nothing() -> None:
    """A launcher/inspect.py would break `import torch`.

    Scripts of launcher/ and launcher/jobs/ are started by path, which puts their folder first on
    sys.path.
    """
    reserved = set(sys.stdlib_module_names) | set(packages_distributions())
    for folder in (ROOT / "launcher", ROOT / "launcher" / "jobs"):
        stems = {p.stem for p in folder.glob("*.py")} - {"__init__"}
        assert stems & (reserved - {"run"}) == set(), folder


@pytest.mark.thorough
@pytest.mark.parametrize(
    "path",
    [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, node.name


@pytest.mark.process
def test_importing_streaming_leaves_no_stand_in_behind() -> None:
    script = (
        "import sys; from data_prep.streaming_compat import import_streaming;"
        " import_streaming();assert not [m for m in sys.modules if m.startswith(('torchvision',"
        " 'transformers')) and not getattr(sys.modules[m], '__file__', None)]; print('clean')"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert completed.stdout.strip() == "clean", completed.stderr


def test_readme_names_only_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:configs|launcher|docs|bench)/[\w./-]+)`", readme):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", readme):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
