"""Slurm job scripts: written from a template, submitted with sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nextpt.base.errors import ConfigError, UserError

if TYPE_CHECKING:
    from nextpt.config import Config

TEMPLATE = Path(__file__).resolve().parents[1] / "slurm" / "train.sbatch"
ROOT = TEMPLATE.parents[2]
# Seconds from the signal to the time limit: Slurm may send it up to 60 s early or late
# (sbatch --signal).
MIN_SIGNAL_SECONDS = 120
# --time (man sbatch): MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]
_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_SBATCH_LINE = re.compile(r"#SBATCH (--[a-z-]+)")


def train_options(
    settings: Config,
    *,
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    cpus_per_rank: int,
    time_limit: str,
) -> dict[str, str]:
    """Return the sbatch options of a training job, --name -> value; an empty value is no option."""
    return {
        "--job-name": settings.run.name,
        "--nodes": str(nodes),
        "--ntasks-per-node": str(ranks_per_node),
        "--cpus-per-task": str(cpus_per_rank),
        "--gpus-per-node": str(gpus_per_node) if gpus_per_node else "",
        "--time": time_limit,
        "--signal": f"USR1@{_signal_seconds(settings)}",
        "--output": f"{log_folder(settings.run_dir)}/%j.log",
    }


def log_folder(folder: Path) -> str:
    """Folder of the logs of a run or a set of runs, absolute, as the value of --output.

    Raises:
        ConfigError: sbatch has no way to write the name.
    """
    path = str((folder / "slurm").resolve())
    if re.search(r"[\\\n]", path):
        raise ConfigError(
            f"{path!r}: sbatch's --output takes no backslash and no line end; use another folder"
        )
    return path.replace("%", "%%")


def log_path(output: str, job: str) -> str:
    """Path of the log of a job whose --output is `output`."""
    return re.sub("%[j%]", lambda symbol: job if symbol[0] == "%j" else "%", output)


def option_line(name: str, value: str) -> str:
    """The line of a script that gives an option to sbatch, which reads quotes as a shell does."""
    if not re.fullmatch(r"[\w@%+=:,./\[\]-]*", value, re.ASCII):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"#SBATCH {name}={value}"


def _signal_seconds(settings: Config) -> int:
    return max(MIN_SIGNAL_SECONDS, round(settings.checkpoint.grace_seconds) + 60)


def check_time_limit(options: Mapping[str, str]) -> None:
    """Refuse a time limit that the signal to save leaves no time to train in.

    Args:
        options: sbatch options, --name -> value. A limit that is in none of sbatch's formats, or is
            0 or a word such as UNLIMITED, is left to sbatch.

    Raises:
        ConfigError: The limit is not above the margin of --signal.
    """
    limit = _seconds(options.get("--time", ""))
    margin = re.search(r"@(\d+)$", options.get("--signal", ""))
    if limit and margin and limit <= int(margin[1]):
        raise ConfigError(
            f"--time {options['--time']} is {limit} s, and the job is signalled to save"
            f" {margin[1]} s before its end (--signal; 60 s more than checkpoint.grace_seconds, at"
            f" least {MIN_SIGNAL_SECONDS}), which leaves no time to train; give a longer --time"
        )


def _seconds(limit: str) -> int | None:
    """Seconds of a time limit in sbatch's format, None for what is not in one."""
    match = _TIME_LIMIT.fullmatch(limit.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    values = [int(part) for part in parts if part is not None]
    if days is None and len(values) < 3:  # MINUTES[:SECONDS]
        values = [0, *values]
    hours, minutes, seconds = [*values, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def job_script(config: Path, overrides: list[str], options: dict[str, str]) -> str:
    """Build a job script from train.sbatch.

    Args:
        config: Absolute path of the config.
        overrides: Config keys, key=value.
        options: sbatch options, --name -> value, in the place of the template's. An empty value
            removes the template's option.
    """
    lines = [
        line
        for line in TEMPLATE.read_text(encoding="utf-8").splitlines()
        if not ((match := _SBATCH_LINE.match(line)) and match[1] in options)
    ]
    header = 1 + max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    option_lines = [option_line(name, value) for name, value in options.items() if value]
    # Slurm copies the script to the node, where the script cannot find the checkout by itself.
    settings = [
        f"set -- {shlex.join([str(config), *overrides])}",
        f"NEXTPT_ROOT={shlex.quote(str(ROOT))}",
        f"PYTHON={shlex.quote(sys.executable)}",
    ]
    return "\n".join([*lines[:header], *option_lines, *settings, *lines[header:]]) + "\n"


def parse_sbatch_option(option: str) -> tuple[str, str]:
    """Parse --name=value into (--name, value). Raises ConfigError."""
    name, equals, value = option.partition("=")
    if not re.fullmatch(r"--[a-z][a-z-]*", name) or not equals or "\n" in value:
        raise ConfigError(
            f"--sbatch {option!r} is not of the form --name=value, such as --sbatch=--partition=gpu"
        )
    return name, value


def submit_script(script: Path) -> str:
    """Submit a script and return the job's number.

    Raises:
        UserError: sbatch is not on this machine, or refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not on this machine; run this where jobs are submitted, or: sbatch {script}"
        )
    process = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if process.returncode:
        message = " ".join((process.stderr or process.stdout).split())
        raise UserError(f"sbatch refuses {script}: {message}")
    return process.stdout.strip().partition(";")[0]
