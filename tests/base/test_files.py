"""Atomic and exclusive writes: links in their way, full disks, and what they leave."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from nextpt.base.errors import ConfigError
from nextpt.base.files import atomic_write, create_file, make_folder, open_exclusively
from nextpt.base.json_files import open_regular
from nextpt.base.processes import parse_identity, process_identity
from tests.support.file_operations import full_disk


def refuse_links(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no hard links")


def test_a_temporary_file_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    for name in (f".x.json.tmp-{os.getpid()}", "x.json.tmp"):
        (tmp_path / name).symlink_to(target)
    with atomic_write(tmp_path / "x.json") as file:
        file.write("new")
    assert target.read_text() == "mine" and (tmp_path / "x.json").read_text() == "new"
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FileExistsError):
        open_exclusively(tmp_path / "link", "w")


def test_a_long_name_leaves_room_for_the_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / ("\N{EURO SIGN}" * 85)  # 255 bytes, the longest name
    with atomic_write(path) as file:
        file.write("new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_no_file_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    path = tmp_path / "lock-1.json"
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        create_file(path, "content")
    assert raised.value.filename == str(path)
    with (
        full_disk(),
        pytest.raises(OSError, match="File too large") as raised,
        atomic_write(path) as file,
    ):
        file.write("content")
    assert raised.value.filename == str(path) and not list(tmp_path.iterdir())


def test_one_of_two_creates_a_file(tmp_path: Path) -> None:
    assert create_file(tmp_path / "x", "first")
    assert not create_file(tmp_path / "x", "second")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not create_file(tmp_path / "link", "third")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x"]
    assert (tmp_path / "x").read_text() == "first"


def test_a_link_whose_first_answer_was_lost_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS repeats the call, and answers that the link exists."""
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert create_file(tmp_path / "x", "content") and (tmp_path / "x").read_text() == "content"
    assert not create_file(tmp_path / "x", "other")


def test_what_keeps_a_folder_from_being_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, problem in (
        ("file", "file is a file"),
        ("file/run", "file is a file"),
        ("dangling", "is a link to nowhere, which does not exist"),
        ("dangling/run", "is a link to nowhere, which does not exist"),
        ("loop/run", "loop is a link in a loop of links"),
    ):
        with pytest.raises(ConfigError) as raised:
            make_folder(tmp_path / name, "run.dir")
        message = str(raised.value)
        assert message.startswith(f"run.dir={tmp_path / name}: ") and problem in message
        assert message.endswith("; give another run.dir")
    make_folder(tmp_path / "a" / "b", "run.dir")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a plain file"):
        open_regular(tmp_path / "pipe", follow_links=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="symbolic link"):
        open_regular(tmp_path / "link")
    with open_regular(tmp_path / "link", follow_links=True) as file:
        assert file.read() == b"x"


@pytest.mark.parametrize(
    "change",
    [{"pid": None}, {"pid": True}, {"pid": -1}, {"pid": 2**40}, {"host": 3}, {"started": 7}],
)
def test_an_identity_of_another_form_is_refused(change: dict[str, object]) -> None:
    identity = json.loads(json.dumps(process_identity()))
    assert parse_identity(identity) == identity
    with pytest.raises(ValueError, match=next(iter(change))):
        parse_identity(identity | change)
    for value in (None, [], 3, "x"):
        with pytest.raises(ValueError, match="no JSON object"):
            parse_identity(value)
