"""Checks of the software: versions, imports, accelerator, conflicting packages, tools."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from launcher.doctor.finding import Finding, note, ok, problem, warning

TESTED_PYTHONS = ((3, 11), (3, 12))
PROBE_SECONDS = 180  # torch and deepspeed load in ten; a cold network disk takes minutes
OUR_KERNELS = Path(__file__).resolve().parents[2] / "kernels"
# Programs that start ranks on other hosts, and their use; none is needed on one machine.
TOOLS = {
    "ssh": "to start ranks on other hosts (deepspeed --hostfile)",
    "pdsh": (
        "deepspeed's default way to other hosts; without it: deepspeed --launcher openmpi, or Slurm"
    ),
    "srun": "for launcher/slurm/train.sbatch",
    "numactl": "for deepspeed --bind_cores_to_rank",
    "nvcc": "only for DeepSpeed ops that are compiled; nextpt needs none",
}


def examine_software(probed: dict[str, dict[str, Any]]) -> list[Finding]:
    """Run all checks of this module on the result of `probe`."""
    return [
        python(),
        *packages(),
        *imports(probed),
        accelerator(probed.get("torch", {}), nvidia_smi()),
        *ops(probed.get("deepspeed", {})),
        kernels(probed.get("kernels", {})),
        *tools(),
    ]


def probe() -> dict[str, dict[str, Any]]:
    """Return the facts about each library, from a child process.

    A library whose import ended the process has {"error": ...}.
    """
    # -P: packages as an installed command sees them, not as a shell in the checkout does.
    command = [sys.executable, "-P", "-m", "launcher.doctor.probe"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
        output, end = (
            completed.stdout,
            f"the import ended the process (exit code {completed.returncode})",
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
        end = f"the import did not end within {PROBE_SECONDS} s"
    results: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        try:
            facts = json.loads(line)
            results[facts.pop("library")] = facts
        except (ValueError, KeyError, AttributeError):
            continue  # output of a library
    for name in ("torch", "triton", "kernels", "streaming", "deepspeed"):
        if name not in results:
            results[name] = {"error": end}
            break
    return results


def python() -> Finding:
    """Check the version of Python."""
    running = sys.version_info[:2]
    text = f"{platform.python_version()} at {sys.prefix}, {platform.system()} {platform.release()}"
    if running < TESTED_PYTHONS[0]:
        return problem(
            "python", text, "nextpt needs 3.11 or newer: make setup PYTHON=/path/to/python3.12"
        )
    if running not in TESTED_PYTHONS:
        return warning(
            "python",
            text,
            "3.11 and 3.12 are tested; in case of problems: make setup PYTHON=/path/to/python3.12",
        )
    return ok("python", text)


def packages() -> list[Finding]:
    """Compare installed versions with the ranges that nextpt declares."""
    try:
        declared = [Requirement(text) for text in requires("nextpt") or []]
    except PackageNotFoundError:
        return [
            problem(
                "nextpt",
                "not installed in this Python",
                "run make setup, or pip install -e . in the checkout",
            )
        ]
    findings = [ok("nextpt", f"{version('nextpt')} at {OUR_KERNELS.parent}")]
    for requirement in declared:
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if (optional and requirement.name != "flash-attn") or (
            requirement.marker and not optional and not requirement.marker.evaluate()
        ):
            continue
        findings.append(_package(requirement, optional))
    return findings


def _package(requirement: Requirement, optional: bool) -> Finding:
    name, expected = requirement.name, str(requirement.specifier)
    try:
        installed = version(name)
    except PackageNotFoundError:
        if optional:
            return note(
                name,
                "not installed",
                "optional: pip install flash-attn on a GPU machine; attention falls back to"
                " torch's",
            )
        return problem(name, f"not installed; {expected} is needed", "run make setup")
    if not requirement.specifier.contains(installed, prereleases=True):
        return problem(
            name,
            f"{installed}, outside {expected}",
            f"pip install '{name}{expected}', or make setup in a new checkout",
        )
    return ok(name, f"{installed} ({expected})")


def imports(probed: dict[str, dict[str, Any]]) -> list[Finding]:
    """Check for libraries that are installed and cannot be imported."""
    advice = {
        "streaming": (
            "torchvision of another torch build is the usual cause: pip uninstall torchvision;"
            " nextpt does not need it"
        ),
        "torch": (
            "run make setup again, or install torch for this machine:"
            " https://pytorch.org/get-started"
        ),
    }
    return [
        problem(
            f"import {name}",
            facts["error"],
            advice.get(
                name,
                "run make setup; NEXTPT_TRACEBACK=1 python -m launcher.doctor.probe shows more",
            ),
        )
        for name, facts in probed.items()
        if "error" in facts
    ]


def nvidia_smi() -> list[list[str]] | None:
    """Return [name, driver, memory MiB, used MiB] per GPU, from the driver.

    None without a driver, [] when it fails.
    """
    if not shutil.which("nvidia-smi"):
        return None
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,memory.used",
        "--format=csv,noheader,nounits",
    ]
    try:
        completed = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return []
    return (
        [[cell.strip() for cell in line.split(",")] for line in completed.stdout.splitlines()]
        if completed.returncode == 0
        else []
    )


def accelerator(torch: dict[str, Any], driver: list[list[str]] | None) -> Finding:
    """Compare the GPUs of the driver with those of torch."""
    name = "accelerator"
    if "error" in torch or not torch:
        return note(name, "unknown: torch cannot be imported", "fix torch first")
    if torch["devices"]:
        kinds = {
            f"{d['name']}, {d['memory'] / 2**30:.0f} GiB,"
            f" sm_{d['capability'][0]}{d['capability'][1]}"
            for d in torch["devices"]
        }
        text = (
            f"{len(torch['devices'])} x {'; '.join(sorted(kinds))}; driver"
            f" {driver[0][1] if driver else 'unknown'}, CUDA {torch['cuda_build']}, NCCL"
            f" {torch['nccl']}"
        )
        busy = [str(i) for i, gpu in enumerate(driver or []) if float(gpu[3]) > 0.1 * float(gpu[2])]
        if busy:
            return warning(
                name,
                f"{text}; memory of GPU {', '.join(busy)} is in use",
                "nvidia-smi names the processes; end them, or "
                "choose other GPUs with CUDA_VISIBLE_DEVICES",
            )
        return ok(name, text)
    if driver is None:
        other = (
            "; there is the driver of an AMD GPU, on which nextpt was never run"
            if Path("/dev/kfd").exists()
            else ""
        )
        return note(name, f"none: training runs on the CPU{other}")
    if not driver:
        return problem(
            name,
            "nvidia-smi exists and the driver does not answer",
            "reload or reinstall the NVIDIA driver; see dmesg",
        )
    if not torch["cuda_build"]:
        return problem(
            name,
            f"{driver[0][0]}, but this torch is a CPU build",
            "rm -r .venv && make setup installs the CUDA build",
        )
    return problem(
        name,
        f"{driver[0][0]} with driver {driver[0][1]}, but torch (CUDA {torch['cuda_build']}) cannot"
        " use it",
        "the driver is older than this CUDA needs, or CUDA_VISIBLE_DEVICES hides the GPU: update"
        " the driver, or install a torch of an older CUDA",
    )


def ops(deepspeed: dict[str, Any]) -> list[Finding]:
    """List the compiled ops of DeepSpeed; nextpt needs none, and compiles none."""
    if "compatible" not in deepspeed:
        return []
    listed = ", ".join(deepspeed["compatible"]) or "none"
    return [
        ok(
            "deepspeed ops",
            f"none is needed; could be compiled: {listed}; prebuilt:"
            f" {', '.join(deepspeed['prebuilt']) or 'none'}",
        )
    ]


def kernels(facts: dict[str, Any]) -> Finding:
    """Check that `import kernels` is ours, not the package of Hugging Face with that name."""
    name = "package kernels"
    try:
        hugging_face = distribution("kernels")
    except PackageNotFoundError:
        hugging_face = None
    ours = facts.get("path") == str(OUR_KERNELS)
    if not ours:
        return problem(
            name,
            f"import kernels gives {facts.get('path', 'an error')}, not {OUR_KERNELS}",
            "pip uninstall kernels, or start from the root of the checkout",
        )
    if hugging_face is not None:
        return warning(
            name,
            f"ours is imported, but Hugging Face's kernels {hugging_face.version} is installed too",
            "use one environment for each: pip uninstall kernels here, or transformers may call"
            " ours instead of its own",
        )
    return ok(name, f"ours, {OUR_KERNELS}")


def tools() -> list[Finding]:
    """List the programs that start ranks on other hosts."""
    installed = [name for name in TOOLS if shutil.which(name)]
    lacking = [f"{name} ({use})" for name, use in TOOLS.items() if name not in installed]
    return [
        note(
            "tools",
            f"found: {', '.join(installed) or 'none'}"
            + (f"; not found: {'; '.join(lacking)}" if lacking else ""),
        )
    ]
