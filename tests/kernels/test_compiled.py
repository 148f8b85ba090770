"""Compiled code of every Triton kernel, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a minute of compiling
# Bytes per block (CUDA C++ Programming Guide, table of compute capabilities; CDNA3 ISA, LDS)
SHARED_MEMORY = {
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
Report = dict[str, dict]


OLDEST = "3.6.0"  # of Triton, of those that are supported


def compile_kernels(*arguments: str, **variables: str) -> Report:
    # A separate process: in this one kernels run in the interpreter.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    completed = subprocess.run(
        [sys.executable, "-m", "kernels.bench.compile_report", "--json", *arguments],
        capture_output=True,
        text=True,
        env=environment | variables,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads(completed.stdout)


@pytest.fixture(scope="module")
def report() -> Report:
    return compile_kernels()


def test_the_oldest_triton_compiles_each_kernel_too(tmp_path: Path) -> None:
    """Its compiler takes fewer things for constants than the installed one."""
    package = f"triton=={OLDEST}"
    target = ["--no-deps", "--quiet", "--target", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "install", *target, package], check=True)
    for only in ("rows bf16, bias", "scale", "D=64", "delta"):
        report = compile_kernels("--only", only, PYTHONPATH=str(tmp_path))
        assert report and not any(f["spilled"] for f in report.values())


def test_every_kernel_is_there(report: Report) -> None:
    assert len(report) >= 45 and {name.split()[0] for name in report} == {
        "rows",
        "scale",
        "attention",
    }
    assert {name.split()[1].rstrip(",") for name in report if name.startswith("attention")} == {
        "forward",
        "keys",
        "queries",
        "delta",
    }


def assert_fits(report: Report, target: str) -> None:
    assert {name: f["spilled"] for name, f in report.items() if f["spilled"]} == {}
    limit = SHARED_MEMORY[target]
    assert {name: f["shared"] for name, f in report.items() if f["shared"] > limit} == {}


def test_nothing_spills_and_shared_memory_fits(report: Report) -> None:
    assert_fits(report, "sm_90")


@pytest.mark.parametrize("target", sorted(SHARED_MEMORY.keys() - {"sm_90"}))
def test_attention_fits_other_devices(target: str) -> None:
    """The code of sm_80 and sm_89 is that of sm_86, which has the least shared memory."""
    report = compile_kernels("--only", "attention", "--target", target)
    assert len(report) >= 28
    assert_fits(report, target)


def test_a_whole_block_can_be_resident(report: Report) -> None:
    """65,536 registers per multiprocessor, allocated to warps in steps of 256."""
    for name, f in report.items():
        assert f["warps"] * -(-32 * f["registers"] // 256) * 256 <= 65536, name


def test_rows_of_logits_are_read_and_written_by_128_bits(report: Report) -> None:
    """From 1024 columns on. The other accesses are single elements: targets, statistics."""
    for name, f in report.items():
        if name == "rows bf16, V=50" or name.startswith("attention"):
            continue
        assert f["loads_128"] > 0 and (f["stores_128"] > 0 or "statistics only" in name), name
        assert f["narrow_vectors"] == 0, name


def test_attention_uses_the_tensor_cores_without_waiting_for_each(report: Report) -> None:
    for name, f in report.items():
        if name.startswith("attention"):
            assert not f["serialized"], name
            assert (
                f["wgmma"]
                or "fp32" in name
                or "delta" in name
                or ("keys, D=256" in name or "keys, D=192" in name)
            ), name


def test_offsets_of_attention_have_64_bits(report: Report) -> None:
    """Row, head and first token of a block meet their strides in 64 bits, in every tensor."""
    tensors = {"forward": 4, "keys": 6, "queries": 5, "delta": 2}
    for name, f in report.items():
        if name.startswith("attention"):
            assert f["wide_products"] >= 3 * tensors[name.split()[1].rstrip(",")], name


def test_offsets_of_rows_of_logits_have_64_bits(report: Report) -> None:
    """Row x stride passes 2^31 elements at 16,384 rows of 128K logits."""
    assert all(f["wide_offsets"] for name, f in report.items() if name.startswith("rows"))
