"""The doctor, on real locks, shared memory, ports, limits and packages."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.doctor import Finding, Status, leftovers, machine, software
from tests.support.commands import run_script

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        timeout=900,
    )


def subjects(completed: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {f["subject"]: f for f in json.loads(completed.stdout)["findings"]}


def test_this_machine_is_fit() -> None:
    completed = doctor("--json")
    assert completed.returncode == 0, completed.stdout
    findings = subjects(completed)
    assert {
        "python",
        "torch",
        "deepspeed",
        "numpy",
        "accelerator",
        "deepspeed ops",
        "extension locks",
        "stale shared memory",
        "memory",
        "disk for runs",
        "port 29500",
        "package kernels",
        "open files",
        "shared memory",
        "host name",
    } <= set(findings)
    assert findings["torch"]["status"] == "ok" and ">=2.10" in findings["torch"]["observed"]
    assert all(f["advice"] for f in findings.values() if f["status"] in ("warning", "problem"))
    plain = doctor()
    assert (
        plain.returncode == 0 and "0 problems" in plain.stdout and "Traceback" not in plain.stderr
    )


def dist(folder: Path, name: str, version: str) -> None:
    """Metadata of an installed package, as pip writes it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_foreign_kernels_package_is_named(tmp_path: Path) -> None:
    dist(tmp_path, "kernels", "0.9.0")
    finding = subjects(doctor("--json", PYTHONPATH=f"{ROOT}:{tmp_path}"))["package kernels"]
    assert (
        finding["status"] == "warning"
        and "0.9.0" in finding["observed"]
        and "pip uninstall kernels" in finding["advice"]
    )
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    completed = doctor("--json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (
        completed.returncode == 1
        and str(tmp_path) in subjects(completed)["package kernels"]["observed"]
    )


def test_the_command_line_imports_its_own_kernels_nevertheless(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    completed = subprocess.run(
        [sys.executable, "-P", "-m", "launcher.cli", "config", "show", "configs/demo.yaml"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=ROOT,
    )
    assert completed.returncode == 0 and "# derived" in completed.stdout, completed.stderr


def test_transformers_ignores_our_kernels_package() -> None:
    script = (
        "import kernels, transformers, torch; from transformers.utils import is_kernels_available"
        " as there\nassert 'get_kernel' not in dir(kernels) and not there()\nc ="
        " transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,"
        " num_hidden_layers=1,"
        " num_attention_heads=2)\n"
        "model = transformers.AutoModelForCausalLM.from_config(c)\n"
        "print(tuple(model(torch.zeros(1, 4, dtype=torch.long)).logits.shape))\n"
        "import kernels.attention; print(kernels.__file__)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert completed.stdout.split("\n")[:2] == [
        "(1, 4, 64)",
        str(ROOT / "kernels" / "__init__.py"),
    ], completed.stderr[-2000:]


def test_versions_outside_the_range_and_missing_packages(tmp_path: Path) -> None:
    dist(tmp_path, "numpy", "2.4.1")
    findings = subjects(doctor("--json", PYTHONPATH=f"{tmp_path}:{ROOT}"))
    assert (
        findings["numpy"]["status"] == "problem"
        and "2.4.1, outside" in findings["numpy"]["observed"]
        and "<2.4" in findings["numpy"]["advice"]
    )
    from packaging.requirements import Requirement

    missing = software._package(Requirement("nothing-of-the-sort>=3"), optional=False)
    assert missing.status is Status.PROBLEM and ">=3" in missing.observed


def test_a_library_that_breaks_on_import_is_reported_as_a_problem(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libcuda is broken')")
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("import os; os._exit(139)")
    completed = doctor("--json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    findings = subjects(completed)
    assert (
        completed.returncode == 1 and "libcuda is broken" in findings["import triton"]["observed"]
    )
    assert (
        "exit code 139" in findings["import deepspeed"]["observed"]
        and findings["package kernels"]["status"] == "ok"
    )


CPU = {"cuda_build": None, "cuda": False, "devices": [], "nccl": None}
GPU = {
    "cuda_build": "13.0",
    "cuda": True,
    "nccl": "2.28.3",
    "devices": [{"name": "NVIDIA H100", "memory": 80 * 2**30, "capability": [9, 0]}],
}


@pytest.mark.parametrize(
    ("torch", "driver", "status", "observed"),
    [
        (CPU, None, "note", "runs on the CPU"),
        (CPU, [["NVIDIA H100", "580.1", "81559", "1"]], "problem", "CPU build"),
        (
            CPU | {"cuda_build": "13.0"},
            [["NVIDIA H100", "470.1", "81559", "1"]],
            "problem",
            "470.1",
        ),
        (CPU | {"cuda_build": "13.0"}, [], "problem", "does not answer"),
        (
            GPU,
            [["NVIDIA H100", "580.1", "81559", "1"]],
            "ok",
            "1 x NVIDIA H100, 80 GiB, sm_90; driver 580.1, CUDA 13.0, NCCL 2.28.3",
        ),
        (GPU, [["NVIDIA H100", "580.1", "81559", "60000"]], "warning", "memory of GPU 0 is in use"),
    ],
)
def test_accelerators(
    torch: dict[str, Any], driver: list[list[str]] | None, status: str, observed: str
) -> None:
    finding = software.accelerator(torch, driver)
    assert (
        finding.status == status
        and observed in finding.observed
        and (finding.advice or status in ("ok", "note"))
    )


def test_a_lock_is_stale_when_its_compilation_is_dead(tmp_path: Path) -> None:
    from torch.utils.file_baton import FileBaton  # the lock of torch's extension loader

    (tmp_path / "py311_cpu" / "shm_comm").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "shm_comm" / "lock"
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert leftovers.extension_locks(tmp_path).status is Status.OK
    baton.release()
    script = (
        "from torch.utils.file_baton import FileBaton as F; import os; assert"
        f" F({str(lock)!r}).try_acquire(); os._exit(9)"
    )
    run_script("-c", script)
    finding = leftovers.extension_locks(tmp_path)
    assert finding.status is Status.WARNING and f"rm {lock}" in finding.advice


@pytest.fixture
def shared() -> Iterator[Path]:
    path = Path("/dev/shm") / f"nextpt-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def test_shared_memory_is_stale_when_nobody_maps_it(shared: Path) -> None:
    script = (
        "import mmap, os, sys\nfd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR); os.ftruncate(fd,"
        " 2**20)\nm = mmap.mmap(fd, 2**20); m[:] = b'x' * 2**20; os.close(fd);"
        " os.utime(sys.argv[1], (1e9, 1e9))\nprint('there', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(shared)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "there\n"
        assert (
            str(shared)
            not in leftovers.stale_shared_memory().advice + leftovers.stale_shared_memory().observed
        )
        holder.stdin.close()
        holder.wait()
    finding = leftovers.stale_shared_memory()
    assert finding.status is Status.WARNING and str(shared) in finding.observed
    os.utime(shared, (time.time(), time.time()))
    # young: a process may be about to open it
    assert str(shared) not in leftovers.stale_shared_memory().observed


def test_a_port_in_use() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        finding = machine.free_port(port)
    assert finding.status is Status.WARNING and "--master_port" in finding.advice
    assert machine.free_port(port).status is Status.OK


def test_few_open_files() -> None:
    script = (
        "from launcher.doctor.machine import limits; print(*[f'{f.subject}|{f.status}|{f.advice}'"
        " for f in limits()], sep='\\n')"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    completed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard)),
    )
    assert "open files|warning|ulimit -n" in completed.stdout


def test_deepspeed_env_with_a_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.deepspeed_env() == []
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n# no\n")
    [finding] = machine.deepspeed_env()
    assert finding.status is Status.PROBLEM and "line 2, 3" in finding.observed
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    assert [f.status for f in machine.deepspeed_env()] == [Status.NOTE]


def test_disks_that_are_full_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        total, free = 100 * 2**30, 2**29

    assert machine.disks(tmp_path / "not" / "yet")[0].status in (Status.OK, Status.WARNING)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage)
    assert machine.disks(tmp_path)[0].status is Status.PROBLEM
    assert machine.shared_memory(tmp_path).status is Status.WARNING
    assert machine.shared_memory(tmp_path / "none").status is Status.WARNING


def test_warnings_and_problems_have_advice() -> None:
    findings: list[Finding] = machine.examine_machine(Path("runs"), 29500)
    assert (
        all(f.advice for f in findings if f.status in (Status.WARNING, Status.PROBLEM))
        and len(findings) >= 8
    )
