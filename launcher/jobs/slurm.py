"""Slurm job scripts: written from a template, submitted with sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from nextpt.base.errors import ConfigError, UserError

TEMPLATE = Path(__file__).resolve().parents[1] / "slurm" / "train.sbatch"
ROOT = TEMPLATE.parents[2]


def job_script(config: Path, overrides: list[str], options: dict[str, str]) -> str:
    """train.sbatch with other #SBATCH lines, and the config and its overrides as its arguments.

    options: --name -> value; an empty value is left out, and with it the line of the template.
    """
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()
    named = re.compile(r"#SBATCH (--[a-z-]+)")
    kept = [line for line in lines if not ((found := named.match(line)) and found[1] in options)]
    last = max(i for i, line in enumerate(kept) if line.startswith("#SBATCH"))
    added = [f"#SBATCH {name}={value}" for name, value in options.items() if value]
    # Slurm copies the script to the node: it cannot find by itself what it belongs to.
    given = [
        f"set -- {shlex.join([str(config), *overrides])}",
        f"NEXTPT_ROOT={shlex.quote(str(ROOT))}",
        f"PYTHON={shlex.quote(sys.executable)}",
    ]
    return "\n".join([*kept[: last + 1], *added, *given, *kept[last + 1 :]]) + "\n"


def further_option(option: str) -> tuple[str, str]:
    """--name and value of an option for sbatch. Raises ConfigError for another form."""
    name, equals, value = option.partition("=")
    if not re.fullmatch(r"--[a-z][a-z-]*", name) or not equals or "\n" in value:
        raise ConfigError(
            f"--sbatch {option!r} is not of the form --name=value, such as --sbatch=--partition=gpu"
        )
    return name, value


def submit_script(script: Path) -> str:
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not on this machine; run this where jobs are submitted, or: sbatch {script}"
        )
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"sbatch refuses {script}: {' '.join((done.stderr or done.stdout).split())}"
        )
    return done.stdout.strip().partition(";")[0]
