"""Processes end with their parents; identity of a process by id and start time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from nextpt.base.processes import (
    child_pids,
    exit_with_parent,
    has_ended,
    is_on_this_machine,
    is_stopped,
    parent_pid,
    process_identity,
    start_ticks,
)

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import os, sys, time
from nextpt.base.processes import exit_with_ancestors, parent_pid
ancestors = [os.getppid(), parent_pid(os.getppid())][:int(sys.argv[1])]
exit_with_ancestors(ancestors, lambda pid: os._exit(9))
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]]);"
    " print(p.pid, flush=True); p.wait()"
)


def is_gone(pid: int) -> bool:
    """Whether a process ends; without its parents' end this one would live for ten minutes."""
    deadline = time.monotonic() + 120
    while start_ticks(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    return start_ticks(pid) is None


def test_a_suspended_process_ends_with_its_parent() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD, "1"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    child, ready = int(parent.stdout.readline()), parent.stdout.readline()
    assert int(ready) == child
    os.kill(child, signal.SIGSTOP)
    while not is_stopped(child):
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    assert is_gone(child)


def test_a_process_ends_with_its_grandparent() -> None:
    top = subprocess.Popen(
        [sys.executable, "-c", PARENT, PARENT, CHILD, "2"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    # In any order: the child's pid by itself and by the one between, and that one's by the top
    printed = Counter(int(top.stdout.readline()) for _ in range(3))
    (child, twice), (middle, once) = printed.most_common()
    assert (twice, once) == (2, 1) and parent_pid(child) == middle and parent_pid(middle) == top.pid
    top.kill()
    top.wait()
    assert is_gone(child)


def test_a_process_is_identified_by_id_and_start_time() -> None:
    me = process_identity()
    assert is_on_this_machine(me) and not has_ended(me)
    assert has_ended(me | {"started": "1"}) and not has_ended(
        me | {"started": "1", "machine": "another boot"}
    )
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(child.pid) is None  # ended, and not waited for
    child.wait()


def worker(path: str) -> None:
    exit_with_parent()
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def test_a_worker_of_multiprocessing_ends_with_its_parent(tmp_path: Path) -> None:
    source = (
        "import multiprocessing as m; from tests.faults.test_orphans import worker; import sys\n"
        "if __name__ == '__main__':\n"
        "    p = m.get_context('spawn').Process(target=worker, args=(sys.argv[1],)); p.start()\n"
        "    p.join()"
    )
    (tmp_path / "parent.py").write_text(source)
    mark = tmp_path / "worker"
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(mark)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while not (mark.exists() and mark.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert is_gone(int(mark.read_text()))


def test_a_guarded_group_ends_with_the_process_that_guards_it() -> None:
    source = (
        "import subprocess, time\n"
        "from launcher.jobs.group_guard import group_ends_with_this_process\n"
        "p = subprocess.Popen(['sh', '-c', 'sleep 600 & sleep 600'], start_new_session=True)\n"
        "with group_ends_with_this_process(p.pid):\n"
        "    print(p.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    group = int(parent.stdout.readline())
    while len(child_pids(group)) < 2:
        time.sleep(0.01)
    processes = [group, *child_pids(group)]
    parent.kill()
    parent.wait()
    assert all(is_gone(pid) for pid in processes)
