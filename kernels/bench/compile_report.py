"""What the compiler makes of the Triton kernels, without a GPU: `python -m kernels.bench.compile_report [--target sm_90] [--only TEXT] [--json]`.

Cross-compiles every variant and asks ptxas for registers, spills and shared memory; counts the
vector loads and stores. Spills, or loads of less than 128 bits, are slow whatever a GPU would
measure.
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

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
}


def examine(
    source: ASTSource, options: dict[str, Any], target: GPUTarget = TARGETS["sm_90"]
) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, widths of global loads and stores, and whether rows have 64-bit offsets."""
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    accesses = {
        kind: [_bits(m) for m in re.findall(rf"{kind}\.global(\.[^ ]+)", ptx)]
        for kind in ("ld", "st")
    }
    with tempfile.TemporaryDirectory() as folder:
        source_file = Path(folder) / "kernel.ptx"
        source_file.write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
        done = subprocess.run(
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
        )
    return {
        "warps": options["num_warps"],
        "registers": int(re.search(r"Used (\d+) registers", done.stderr).group(1)),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)),
        "shared": compiled.metadata.shared,
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
        "serialized": "serialized" in done.stderr,
        "wgmma": "wgmma.mma_async" in ptx,
    }


def _wide_offsets(ptx: str) -> bool:
    """Whether the program's number meets a stride in 64 bits, and never in 32."""
    row = re.search(r"mov\.u32\s+(%r\d+), %ctaid\.x", ptx)
    if row is None:
        return False
    row = row.group(1)
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
    return int(re.search(r"\.[a-z]+(\d+)$", modifiers).group(1)) * (
        int(vector.group(1)) if vector else 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.compile_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name holds this")
    arguments = parser.parse_args()
    chosen = {name: variant for name, variant in variants().items() if arguments.only in name}
    found = {name: examine(*variant, TARGETS[arguments.target]) for name, variant in chosen.items()}
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"triton {triton.__version__}, {arguments.target}\n")
    print(
        "| kernel | warps | registers | spilled bytes | shared bytes | 128-bit loads | 128-bit"
        " stores |\n|---|---|---|---|---|---|---|"
    )
    for name, f in found.items():
        note = " (wgmma serialized)" if f["serialized"] else ""
        print(
            f"| {name}{note} | {f['warps']} | {f['registers']} | {f['spilled']} | {f['shared']} |"
            f" {f['loads_128']} of {f['loads']} | {f['stores_128']} of {f['stores']} |"
        )


if __name__ == "__main__":
    main()
