"""Report of the compiler on the Triton kernels: registers, spills, shared memory, vector loads.

`python -m kernels.bench.compile_report [--target sm_90] [--only TEXT] [--json]`; needs no GPU.

Cross-compiles every variant and asks ptxas, or the assembler's notes for AMD, for registers, spills
and shared memory; counts the vector loads and stores. Spills and loads of less than 128 bits are
slow on every GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels.bench.variants import variants

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


def examine(
    source: ASTSource, options: dict[str, Any], target: GPUTarget = TARGETS["sm_90"]
) -> dict[str, Any]:
    """Compile a kernel and count what its code takes.

    Returns:
        Registers, spilled bytes, shared memory, global loads and stores by width, and whether rows
        have 64-bit offsets.
    """
    compiled = triton.compile(source, target=target, options=options)
    report = {"warps": options["num_warps"], "shared": compiled.metadata.shared}
    if target.backend == "hip":
        return report | _examine_amd(compiled.asm["amdgcn"])
    return report | _examine_ptx(compiled.asm["ptx"], target)


def _examine_amd(code: str) -> dict[str, Any]:
    """Count what a program for AMD takes; what is spilled lies in each thread's private segment."""
    loads, stores = (
        re.findall(rf"(?:global|buffer)_{kind}_(\w+)", code) for kind in ("load", "store")
    )
    return {
        "registers": int(_match(r"\.vgpr_count:\s+(\d+)", code)),
        "spilled": int(_match(r"\.private_segment_fixed_size:\s+(\d+)", code)),
        "loads_128": loads.count("dwordx4"),
        "stores_128": stores.count("dwordx4"),
        "loads": len(loads),
        "stores": len(stores),
        "mfma": "v_mfma" in code,
    }


def _examine_ptx(ptx: str, target: GPUTarget) -> dict[str, Any]:
    accesses = {
        kind: [_bits(m) for m in re.findall(rf"{kind}\.global(\.[^ ]+)", ptx)]
        for kind in ("ld", "st")
    }
    with tempfile.TemporaryDirectory() as folder:
        source_file = Path(folder) / "kernel.ptx"
        source_file.write_text(ptx)
        arch = _match(r"\.target (sm_\w+)", ptx)
        log = subprocess.run(
            [
                get_ptxas(target.arch).path,
                "-v",
                f"--gpu-name={arch}",
                str(source_file),
                "-o",
                f"{folder}/kernel.cubin",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return {
        "registers": int(_match(r"Used (\d+) registers", log)),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        "loads_128": sum(b >= 128 for b in accesses["ld"]),
        "stores_128": sum(b >= 128 for b in accesses["st"]),
        "loads": len(accesses["ld"]),
        "stores": len(accesses["st"]),
        "narrow_vectors": sum(
            b < 128
            for kind in ("ld", "st")
            for b in (_bits(m) for m in re.findall(rf"{kind}\.global(\.v[^ ]+)", ptx))
        ),
        "wide_offsets": _wide_offsets(ptx),
        "wide_products": len(re.findall(r"(mul\.wide|mad\.wide|mul\.lo\.s64|mad\.lo\.s64)", ptx)),
        "serialized": "serialized" in log,
        "wgmma": "wgmma.mma_async" in ptx,
    }


def _wide_offsets(ptx: str) -> bool:
    """Whether the program's number is multiplied by a stride in 64 bits, and never in 32."""
    program = re.search(r"mov\.u32\s+(%r\d+), %ctaid\.x", ptx)
    if program is None:
        return False
    row = program.group(1)
    wide = re.findall(rf"cvt\.u64\.u32\s+(%rd\d+), {row};", ptx)
    product = wide and re.search(
        rf"mul\.lo\.s64\s+%rd\d+, (%rd\d+, {wide[0]}|{wide[0]}, %rd\d+);", ptx
    )
    return bool(product) and not re.search(
        rf"(mul|mad)\.lo\.[su]32\s+%r\d+, (%r\d+, )?{row}[,;]", ptx
    )


def _bits(modifiers: str) -> int:
    """Width of a PTX access such as .v4.b32."""
    vector = re.search(r"\.v(\d)", modifiers)
    return int(_match(r"\.[a-z]+(\d+)$", modifiers)) * (int(vector.group(1)) if vector else 1)


def _match(pattern: str, text: str) -> str:
    """First group of a pattern that must match."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern!r} does not match: {text[:200]!r}")
    return match.group(1)


def main() -> None:
    """Compile the variants and print a table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.compile_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name holds this")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    reports = {
        name: examine(*variant, target)
        for name, variant in variants(target).items()
        if arguments.only in name
    }
    if arguments.json:
        print(json.dumps(reports))
        return
    print(f"triton {triton.__version__}, {arguments.target}\n")
    print(
        "| kernel | warps | registers | spilled bytes | shared bytes | 128-bit loads | 128-bit"
        " stores |\n|---|---|---|---|---|---|---|"
    )
    for name, f in reports.items():
        note = " (wgmma serialized)" if f.get("serialized") else ""
        print(
            f"| {name}{note} | {f['warps']} | {f['registers']} | {f['spilled']} | {f['shared']} |"
            f" {f['loads_128']} of {f['loads']} | {f['stores_128']} of {f['stores']} |"
        )


if __name__ == "__main__":
    main()
