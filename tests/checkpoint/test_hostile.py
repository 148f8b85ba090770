"""Malicious checkpoints: sizes and hashes agree, and the content is wrong.

Each is refused in one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nextpt.base.collective import RankGroup
from nextpt.base.errors import CheckpointError
from nextpt.base.files import canonical_json
from nextpt.checkpoint.manifest import manifest_problem
from nextpt.checkpoint.selection import open_checkpoint, select_checkpoint
from tests.support.checkpoints import as_version_1, edit, forge, holds, write

INDEX, TENSORS = "rank-00000.json", "rank-00000.safetensors"


def refusal(root: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(root)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it the right hash of itself again."""
    value = json.loads((folder / "manifest.json").read_text())
    del value["xxh3"]
    change(value)
    value["xxh3"] = xxhash.xxh3_128(canonical_json(value).encode()).hexdigest()
    (folder / "manifest.json").write_text(canonical_json(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["files"].update({"../../etc/passwd": m["files"]["state.json"]}),
            "a file that no checkpoint of 1 ranks has: '../../etc/passwd'",
        ),
        (
            lambda m: m["files"].update({"/etc/passwd": m["files"]["state.json"]}),
            "a file that no checkpoint of 1 ranks has: '/etc/passwd'",
        ),
        (lambda m: m["files"].update({"\x1b[2J": m["files"]["state.json"]}), r"'\x1b[2J'"),
        (lambda m: m["files"].pop("state.json"), "does not name state.json"),
        (lambda m: m["files"].pop(TENSORS), f"does not name {TENSORS}"),
        (
            lambda m: m["files"]["state.json"].update(size=-1),
            "'size': Input should be greater than or equal to 0",
        ),
        (
            lambda m: m["files"]["state.json"].update(size=2**63),
            "'size': Input should be less than",
        ),
        (lambda m: m["files"]["state.json"].update(size=10**5000), "digit"),
        (
            lambda m: m["files"]["state.json"].update(size=1e300),
            "'size': Input should be a valid integer",
        ),
        (
            lambda m: m["files"]["state.json"].update(size=True),
            "'size': Input should be a valid integer",
        ),
        (lambda m: m["files"]["state.json"].update(size=2**62), "expected 4611686018427387904"),
        (lambda m: m["files"]["state.json"].update(xxh3="zz"), "'xxh3': String should match"),
        (lambda m: m["files"]["state.json"].update(mode=0o777), "'mode': Extra inputs"),
        (lambda m: m.update(files=[]), "'files': Input should be"),
        (lambda m: m.update(world_size=10**9), "'world_size': Input should be less than"),
        (lambda m: m.update(world_size=2), "does not name rank-00001.json"),
        (lambda m: m.update(step=7), "its manifest is of step 7"),
        (lambda m: m.update(step=-7), "'step': Input should be greater"),
        (lambda m: m.update(lineage=[[1]]), "'lineage'"),
        (
            lambda m: m.update(format_version=4),
            "its format version is 4, this nextpt reads up to 3",
        ),
        (
            lambda m: m.update(format_version=0),
            "'format_version': Input should be greater than or equal to 1",
        ),
        (
            lambda m: m.update(format_version="3"),
            "'format_version': Input should be a valid integer",
        ),
        (
            lambda m: m.update(format_version=True),
            "'format_version': Input should be a valid integer",
        ),
    ],
)
def test_a_manifest_with_false_values(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    limit = sys.get_int_max_str_digits()
    folder = write(tmp_path, 1)
    sys.set_int_max_str_digits(0)
    rewrite_manifest(folder, change)
    sys.set_int_max_str_digits(limit)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"files": {}, "files": {}}', "the key 'files' comes twice"),
        ('{"files": NaN}', "NaN is not finite"),
        ('{"files": -Infinity}', "-Infinity is not finite"),
        ('{"files": 1e999}', "1e999 is not finite"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
        ("", "Expecting value"),
        ("[]\n", "in order"),
        ("null\n", "in order"),
        ('{"files": "\\ud800"}', "surrogates not allowed"),
        ("\x00" * 100, "Expecting value"),
        ('{"files":{}}', "not written as nextpt writes it"),
    ],
)
def test_a_file_that_is_not_a_manifest(tmp_path: Path, text: str, message: str) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    assert message in refusal(tmp_path)
    # The other files are parsed as strictly
    if "nested" in message or "twice" in message or "finite" in message:
        for name in ("state.json", INDEX):
            other = write(tmp_path / name, 1)
            (other / name).write_text(text)
            forge(other)
            assert message in refusal(tmp_path / name) and name in refusal(tmp_path / name)


def test_a_manifest_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    with open(folder / "manifest.json", "r+b") as file:
        file.truncate(2**30)
    assert "larger than any manifest" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", INDEX, TENSORS])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_and_pipes_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path, 1) / name
    path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert name in refusal(tmp_path) or "Is a directory" in refusal(tmp_path)


def test_extra_files_and_a_linked_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "hook.py").write_text("raise SystemExit")
    assert "holds 'hook.py', which its manifest does not name" in refusal(tmp_path)
    (folder / "hook.py").unlink()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert "it is a symbolic link" in refusal(tmp_path)


def first(value: dict[str, Any], name: str = "a") -> dict[str, Any]:
    return next(f for f in value["fragments"] if f["name"] == name and f["slices"][0][0] == 0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (INDEX, lambda v: v["fragments"].pop(0), "leave gaps or overlap"),
        (INDEX, lambda v: v["fragments"].append(v["fragments"][0]), "leave gaps or overlap"),
        (INDEX, lambda v: first(v).update(slices=[[1, 3], [0, 3]]), "leave gaps or overlap"),
        (
            INDEX,
            lambda v: first(v).update(kind="exp_avg" if first(v)["kind"] == "weight" else "weight"),
            "leave gaps or overlap",
        ),
        (INDEX, lambda v: first(v).update(kind="gradient"), "does not have room"),
        (INDEX, lambda v: first(v).update(slices=[[0, 6], [0, 3]]), "does not have room"),
        (INDEX, lambda v: first(v).update(slices=[[2, 2], [0, 3]]), "does not have room"),
        (INDEX, lambda v: first(v).update(slices=[[3, 1], [0, 3]]), "does not have room"),
        (INDEX, lambda v: first(v).update(slices=[[-1, 2], [0, 3]]), "greater than or equal to 0"),
        (INDEX, lambda v: first(v).update(slices=[[0, 2]]), "does not have room"),
        (INDEX, lambda v: first(v).update(slices=[[0, 2, 4], [0, 3]]), "at most 2 items"),
        (INDEX, lambda v: first(v).update(shape=[5, 4]), "does not have room"),
        (INDEX, lambda v: first(v).update(name="z"), "does not have room"),
        (INDEX, lambda v: first(v).update(tensor="../x"), "String should match"),
        (INDEX, lambda v: first(v).update(tensor="000099"), "do not name the same tensors"),
        (INDEX, lambda v: v.update(fragments={}), "should be a valid list"),
        (INDEX, lambda v: v.pop("rng"), "Field required"),
        ("state.json", lambda v: v["parameters"].update(a=[2**40, 2**40]), "does not have room"),
        (
            "state.json",
            lambda v: (v["parameters"].update(z=[3]), v["optimizer_state"].update(z={})),
            "fragments of 'z' (weight) leave gaps or overlap",
        ),
        ("state.json", lambda v: v["parameters"].update(z=[3]), "optimizer_state differ in 'z'"),
        (
            "state.json",
            lambda v: v["optimizer_state"]["a"].update(momentum=[5, 3]),
            "fragments of 'a' (momentum) leave gaps or overlap",
        ),
        ("state.json", lambda v: v["optimizer_state"]["a"].pop("exp_avg"), "does not have room"),
        ("state.json", lambda v: v["optimizer_state"]["a"].update(exp_avg=[3, 5]), "have room"),
        ("state.json", lambda v: v["optimizer_state"]["a"].update(weight=[5, 3]), "kind 'weight'"),
        ("state.json", lambda v: v["parameters"].update(a=[5, -3]), "greater than or equal to 0"),
        (
            "state.json",
            lambda v: (v["parameters"].pop("a"), v["optimizer_state"].pop("a")),
            "does not have room",
        ),
        ("state.json", lambda v: v["parameters"].pop("a"), "optimizer_state differ in 'a'"),
        ("state.json", lambda v: v.update(step=2), "state.json says step = 2, the manifest 1"),
        ("state.json", lambda v: v.update(step="1"), "valid integer"),
        (
            "state.json",
            lambda v: v.update(world_size=2),
            "state.json says world_size = 2, the manifest 1",
        ),
        ("state.json", lambda v: v["scalars"].update(optimizer_updates="1"), "valid number"),
        ("state.json", lambda v: v.pop("scalars"), "Field required"),
    ],
)
def test_files_that_do_not_fit_together(
    tmp_path: Path, name: str, change: Callable[[Any], None], message: str
) -> None:
    folder = write(tmp_path, 1)
    edit(folder / name, change)
    forge(folder)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"000000": t["000000"].double()}),
        lambda t: t.update({"000000": t["000000"].to(torch.int32)}),
        lambda t: t.update({"000000": t["000000"][:1]}),
        lambda t: t.update({"000000": t["000000"].flatten()}),
        lambda t: t.update({"999999": torch.zeros(1)}),
        lambda t: t.pop("000000"),
    ],
)
def test_tensors_that_do_not_fit_their_index(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    folder = write(tmp_path, 1)
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    forge(folder)
    assert TENSORS in refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 64,
        b"\x00" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        (10**8).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_tensor_file_that_is_not_safetensors(tmp_path: Path, data: bytes) -> None:
    folder = write(tmp_path, 1)
    (folder / TENSORS).write_bytes(data)
    forge(folder)
    assert f"{TENSORS} cannot be read" in refusal(tmp_path)


def test_a_folder_under_the_name_of_another_step(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2).rename(tmp_path / "step-000000003")
    warnings: list[str] = []
    checkpoint = select_checkpoint(tmp_path, "auto", RankGroup.world(), warnings.append)
    assert (
        checkpoint is not None
        and checkpoint.step == 1
        and "its manifest is of step 2" in warnings[0]
    )
    old = write(tmp_path / "old", 2)
    as_version_1(old)
    old.rename(tmp_path / "old" / "step-000000003")
    assert "state.json says step = 2, the manifest 3" in refusal(tmp_path / "old")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["step", "files", "slices", "x"]), children, max_size=3)
    ),
    max_leaves=8,
)


def paths_of_values(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all values inside a JSON value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, child in items for p in paths_of_values(child, (*path, key)))]


@pytest.mark.thorough
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    name=st.sampled_from(["manifest.json", "state.json", INDEX]),
    pick=st.integers(0, 10**6),
    new=JSON,
)
def test_any_value_anywhere_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, name: str, pick: int, new: Any
) -> None:
    """Any value leads to a CheckpointError in one line, or changes nothing.

    An accepted checkpoint holds the tensors that were written.
    """
    root = tmp_path_factory.mktemp("any")
    folder = write(root, 1)

    def put(value: Any) -> None:
        paths = [p for p in paths_of_values(value) if p]
        *above, last = paths[pick % len(paths)]
        for key in above:
            value = value[key]
        value[last] = new

    if name == "manifest.json":
        rewrite_manifest(folder, put)
    else:
        edit(folder / name, put)
        forge(folder)
    refusal = ""
    try:
        assert holds(open_checkpoint(root), 1.0)
    except CheckpointError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_older_format_versions_are_read(tmp_path: Path) -> None:
    as_version_1(write(tmp_path, 3, 5.0))
    as_version_1(write(tmp_path, 12, 6.0, world_size=2))
    assert holds(open_checkpoint(tmp_path), 6.0) and holds(open_checkpoint(tmp_path, 3), 5.0)
    folder = write(tmp_path, 4, 7.0)  # saved later, by this version
    assert holds(open_checkpoint(tmp_path), 7.0) and manifest_problem(folder) is None


def test_a_newer_format_is_refused_and_not_skipped(tmp_path: Path) -> None:
    """A newer format may be valid: an older checkpoint in its place would be a silent rollback."""
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    rewrite_manifest(folder, lambda m: m.update(format_version=4, more={}))
    with pytest.raises(CheckpointError, match=r"format version is 4.*checkpoint.resume=STEP"):
        select_checkpoint(tmp_path, "auto", RankGroup.world(), print, repair=True)
    assert folder.exists() and select_checkpoint(tmp_path, 1, RankGroup.world(), print) is not None


LOAD = """
import os
import sys
from pathlib import Path
import torch
from nextpt.checkpoint.selection import select_checkpoint
from nextpt.base.collective import RankGroup
from nextpt.train.random_states import set_rng_state

FORBIDDEN = set(
    "exec compile import pickle.find_class marshal.loads marshal.load code.__new__ function.__new__"
    " os.system os.exec os.posix_spawn os.fork os.forkpty subprocess.Popen pty.spawn ctypes.dlopen"
    " ctypes.dlsym socket.connect socket.bind os.putenv shutil.rmtree os.remove".split()
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
seen, on = [], False

def hook(event, args):
    if on and (event in FORBIDDEN or event == "open" and args[2] & WRITING):
        seen.append((event, str(args)[:200]))

sys.addaudithook(hook)
on = True
for part in sys.argv[1:]:
    try:
        ranks = RankGroup.world()
        checkpoint = select_checkpoint(Path(part), "auto", ranks, lambda text: None, repair=True)
        for name in checkpoint.shapes():
            checkpoint.read_whole(name)
        if "python" in (states := checkpoint.rng(0)):
            set_rng_state(states)
    except Exception as error:
        print(type(error).__name__)
    else:
        print("read")
exec("1")  # the hook does see
on = False
assert [event for event, _ in seen] == ["compile", "exec"], seen
print("clean")
"""


@pytest.mark.process
def test_no_path_through_loading_runs_code(tmp_path: Path) -> None:
    """An audit hook watches loading: a valid checkpoint, fallbacks, a refusal, files with pickles.

    No module is imported either.
    """
    good, fallback, refused, pickled = (
        tmp_path / name for name in ("good", "fallback", "refused", "pickled")
    )
    for root in (good, fallback):
        write(root, 1, world_size=2)
    (write(fallback, 2) / "state.json").write_text("{}")
    edit(write(fallback, 3) / INDEX, lambda v: v["fragments"].pop())
    forge(fallback / "step-000000003")
    (write(refused, 1) / "manifest.json").unlink()
    torch.save({"a": torch.zeros(3)}, write(pickled, 1) / TENSORS)
    forge(pickled / "step-000000001")
    completed = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, (good, fallback, refused, pickled))],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert completed.stdout.split() == [
        "read",
        "read",
        "NoValidCheckpointError",
        "NoValidCheckpointError",
        "clean",
    ], completed.stderr + completed.stdout
