"""Installs nextpt and its dependencies into the Python that runs this file. Standard library only.

A machine with an NVIDIA GPU gets torch's CUDA build; any other the CPU build, never gigabytes of
CUDA packages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A release whose CPU build is known to work with the rest; on a GPU the newest is installed.
CPU_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# pip's warning, on every later install, about the one package that is installed without its
# dependencies on purpose.
KNOWN = ("ERROR: pip's dependency resolver does not currently", "mosaicml-streaming ")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def pip(*arguments: str) -> None:
    """Run pip install; a failure ends the setup with one line."""
    completed = subprocess.run(
        [*PIP, "install", "--quiet", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    sys.stderr.write(
        "".join(
            line
            for line in completed.stderr.splitlines(keepends=True)
            if not line.startswith(KNOWN)
        )
    )
    if completed.returncode:
        sys.exit(
            f"error: setup failed at: pip install {' '.join(arguments)}\nread pip's message above,"
            " then run make setup again"
        )


def has_gpu() -> bool:
    """True when the NVIDIA driver answers."""
    return (
        bool(shutil.which("nvidia-smi"))
        and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode
    )


def installed_torch() -> str | None:
    """Version of torch that this Python already has."""
    probe = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
    )
    return probe.stdout.strip() or None


def registry_gives_cpu_build() -> bool:
    """Whether plain `pip install` of CPU_TORCH would bring no CUDA packages."""
    probe = subprocess.run(
        [*PIP, "install", "--quiet", "--dry-run", "--report", "-", CPU_TORCH],
        capture_output=True,
        text=True,
    )
    try:
        names = [item["metadata"]["name"].lower() for item in json.loads(probe.stdout)["install"]]
    except (ValueError, KeyError):
        return False
    return not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


def install_torch() -> None:
    """Install torch, unless it is there: the CUDA build beside a GPU, else the CPU build."""
    if version := installed_torch():
        print(f"setup: torch {version} is there")
    elif has_gpu():
        print("setup: torch for the NVIDIA GPU of this machine (gigabytes, minutes)")
        pip("torch>=2.10", "numpy<2.4")
    elif sys.platform != "linux" or registry_gives_cpu_build():
        print("setup: torch, CPU build")
        pip(CPU_TORCH, "numpy<2.4")
    else:
        print(f"setup: torch, CPU build from {CPU_INDEX}")
        pip("numpy<2.4")
        pip("--index-url", CPU_INDEX, CPU_TORCH)


def main() -> None:
    """Install torch, the dependencies and nextpt itself, editable."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    install_torch()
    streaming = [d for d in project["dependencies"] if d.startswith("mosaicml-streaming")]
    others = [
        d for d in project["dependencies"] if d not in streaming and not d.startswith("torch>")
    ]
    print("setup: the other dependencies")
    # Deepspeed is published as source only; without wheel, older pips build it in a deprecated way
    pip("wheel")
    pip(
        *others,
        *extras["streaming-lean"],
        *extras["trackers"],
        *extras["s3"],
        *extras["ray"],
        *extras["compressors"],
        *extras["harness"],
        *extras["test"],
        *extras["dev"],
    )
    pip("--no-deps", *streaming)
    pip("--no-deps", "--editable", ".")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on with what is missing")
