"""Checks of the machine: memory, disks, limits, ports, names, environment variables."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

import psutil

from launcher.doctor.finding import Finding, note, ok, problem, warning

GIB = 2**30
# A checkpoint of the demo; one of a 1.3B model is 16 GiB
MIN_DISK, LOW_DISK = 1 * GIB, 10 * GIB
LOW_MEMORY = 4 * GIB  # torch, deepspeed and a small model on two ranks take about two
LOW_SHM = 1 * GIB  # Docker gives 64 MiB; NCCL and streaming need more
MIN_FILES = 4096  # shards, sockets of all ranks and libraries; 1024 is a common default
# Variables that affect the rendezvous of the ranks or the computation.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PYTHONPATH",
    "LD_PRELOAD",
    "TORCH_EXTENSIONS_DIR",
)
PREFIXES = ("NCCL_", "GLOO_", "DS_", "UCX_", "TORCH_NCCL_", "PYTORCH_")


def examine_machine(folder: Path, port: int) -> list[Finding]:
    """Run all checks of this module.

    Args:
        folder: Folder that runs are written to.
        port: Port of deepspeed's rendezvous, unless another is given.
    """
    return [
        processor(),
        memory(),
        *disks(folder),
        shared_memory(),
        *limits(),
        free_port(port),
        host_name(),
        *deepspeed_env(),
        variables(),
    ]


def processor() -> Finding:
    """Check cores and vector instructions."""
    try:
        flags = next(
            (
                line
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("flags")
            ),
            "",
        ).split()
    except OSError:
        flags = []
    vector = next(
        (name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags),
        "no AVX2",
    )
    bf16 = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    text = (
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable, {vector},"
        f" {'bf16' if bf16 else 'no bf16'} instructions"
    )
    return (
        ok("processor", text)
        if bf16
        else note("processor", text, "when training on this CPU use train.precision=fp32")
    )


def memory() -> Finding:
    """Check the free memory of the host or of the container."""
    host = psutil.virtual_memory()
    available, total, source = host.available, host.total, "host"
    if (limit := _cgroup_limit()) and limit < total:
        total, source = limit, "container limit"
        available = min(available, limit - _cgroup_used())
    text = f"{available / GIB:.1f} GiB of {total / GIB:.1f} GiB free ({source})"
    if available < LOW_MEMORY:
        return warning(
            "memory",
            text,
            f"ranks of a CPU run need about 1 GiB each; free some, below {LOW_MEMORY / GIB:.0f}"
            " GiB they may be killed",
        )
    return ok("memory", text)


def _cgroup_limit() -> int | None:
    return _number("/sys/fs/cgroup/memory.max") or _number(
        "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    )


def _cgroup_used() -> int:
    return (
        _number("/sys/fs/cgroup/memory.current")
        or _number("/sys/fs/cgroup/memory/memory.usage_in_bytes")
        or 0
    )


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def disks(folder: Path) -> list[Finding]:
    """Check the free space for runs and temporary files, each disk once."""
    findings, seen = [], set()
    for use, path in (
        ("runs", folder.absolute()),
        ("temporary files", Path(tempfile.gettempdir())),
    ):
        while not path.exists():
            path = path.parent
        if (device := path.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(path).free
        subject, text = f"disk for {use}", f"{free / GIB:.1f} GiB free at {path}"
        if not os.access(path, os.W_OK):
            findings.append(
                problem(
                    subject,
                    f"{path} is not writable",
                    "give another folder with run.dir, or change its permissions",
                )
            )
        elif free < MIN_DISK:
            findings.append(
                problem(subject, text, "free some: a checkpoint holds 12 bytes per parameter")
            )
        elif free < LOW_DISK:
            findings.append(
                warning(
                    subject,
                    text,
                    "a checkpoint holds 12 bytes per parameter: 15 GiB for 1.3B parameters",
                )
            )
        else:
            findings.append(ok(subject, text))
    return findings


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Check the size of shared memory."""
    if not path.is_dir():
        return warning(
            "shared memory", f"{path} is missing", "mount it: mount -t tmpfs tmpfs /dev/shm"
        )
    size = shutil.disk_usage(path)
    text = f"{size.free / GIB:.1f} GiB of {size.total / GIB:.1f} GiB free at {path}"
    if size.free < LOW_SHM:
        return warning(
            "shared memory",
            text,
            "start the container with --shm-size=8g (or --ipc=host), or remove leftovers",
        )
    return ok("shared memory", text)


def limits() -> list[Finding]:
    """Check the limits of open files, processes and locked memory."""
    findings = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)} (hard limit {_limit(hard)})"
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        findings.append(
            warning(
                "open files",
                text,
                f"ulimit -n {min(65536, hard) if hard > 0 else 65536} before the start, or nofile"
                " in /etc/security/limits.conf",
            )
        )
    else:
        findings.append(ok("open files", text))
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        findings.append(
            warning(
                "processes and threads",
                f"{_limit(soft)} (hard limit {_limit(hard)})",
                "ulimit -u 65536: each rank starts dozens of threads",
            )
        )
    if any(Path("/sys/class/infiniband").glob("*")):
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        locked = "locked memory"
        findings.append(
            ok(locked, "unlimited")
            if soft == resource.RLIM_INFINITY
            else warning(
                locked,
                _limit(soft),
                "InfiniBand needs it unlimited: ulimit -l unlimited, for Slurm in slurmd's service"
                " file",
            )
        )
    return findings


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def free_port(port: int) -> Finding:
    """Check that a TCP port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return warning(
                f"port {port}",
                f"not free ({error.strerror})",
                "another job may be training: deepspeed --master_port 29501; "
                "nextpt train uses a free port",
            )
    return ok(f"port {port}", "free; deepspeed's default for the rendezvous")


def host_name() -> Finding:
    """Check that the host name has an address: without one Gloo cannot connect ranks."""
    name = socket.gethostname()
    try:
        return ok("host name", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        return problem(
            "host name",
            f"{name} has no address",
            f"add '127.0.1.1 {name}' to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface",
        )


def deepspeed_env() -> list[Finding]:
    """Check the .deepspeed_env files: deepspeed fails on empty lines and exports comments."""
    findings = []
    for folder in (Path.home(), Path.cwd()):
        path = folder / ".deepspeed_env"
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            continue
        bad = [
            str(number)
            for number, line in enumerate(lines, 1)
            if "=" not in line or line.lstrip().startswith("#")
        ]
        if bad:
            findings.append(
                problem(
                    ".deepspeed_env",
                    f"{path}: line {', '.join(bad)} is not NAME=value",
                    "remove empty lines and comments: deepspeed fails on them",
                )
            )
        else:
            findings.append(note(".deepspeed_env", f"{path} is exported on every host"))
    return findings


def variables() -> Finding:
    """List the environment variables that affect training."""
    assignments = [
        f"{name}={os.environ[name]}"
        for name in sorted(os.environ)
        if name in VARIABLES or name.startswith(PREFIXES)
    ]
    return note(
        "environment",
        "; ".join(assignments) if assignments else "no variable that affects training is set",
    )
