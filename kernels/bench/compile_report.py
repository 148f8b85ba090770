"""What the compiler makes of the Triton kernels, without a GPU: `python -m kernels.bench.compile_report [--json]`.

Cross-compiles every variant for sm_90 and asks ptxas for registers, spills and shared memory; counts the vector loads
and stores. Spills, or loads of less than 128 bits, are slow whatever a GPU would measure.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.cross_entropy.rows_triton import block_size, compiler_options, row_kernel
from kernels.cross_entropy.scale_triton import BLOCK, scale_kernel

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def row_variant(logits: torch.dtype, gradient: torch.dtype, vocabulary: int = 128256, targets: int = 1, bias: bool = False, cap: bool = False,
                smooth: bool = False, describe: bool = True, grad: bool = True) -> tuple[ASTSource, dict[str, int]]:
    """One variant of the row kernel as the launcher would specialise it: pointers, width and strides are multiples of 16."""
    block = block_size(vocabulary, cap)
    kinds = {"logits": POINTERS[logits], "gradient": POINTERS[gradient], "bias": POINTERS[logits], "targets": "*i64", "hits": "*i1",
             "vocabulary": "i32", "width": "i32", "logits_stride": "i64", "gradient_stride": "i64", "softcap": "fp32"}
    constants = {"TARGETS": targets, "HAS_BIAS": bias, "HAS_CAP": cap, "LINEAR": smooth, "SQUARE": True, "FLAT": smooth,
                 "DESCRIBE": describe, "TOTAL": smooth, "GRADIENT": grad, "SLOTS": triton.next_power_of_2(targets), "BLOCK": block}
    aligned = {"logits", "gradient", "bias", "width", "logits_stride", "gradient_stride"}
    return _source(row_kernel, kinds, constants, aligned), compiler_options(block)


def _source(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], aligned: set[str]) -> ASTSource:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    return ASTSource(kernel, signature, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=attributes)


def variants() -> dict[str, tuple[ASTSource, dict[str, int]]]:
    """Everything that training and evaluation launch, by name."""
    bf16, fp32 = torch.bfloat16, torch.float32
    everything = {"bias": True, "cap": True, "smooth": True}
    found = {f"rows bf16, V={v}": row_variant(bf16, bf16, v) for v in (50, 1000, 4000, 8000, 128256)}
    found |= {"rows fp16": row_variant(torch.float16, torch.float16), "rows fp32": row_variant(fp32, fp32)}
    found |= {f"rows fp32 -> bf16, V={v}": row_variant(fp32, bf16, v) for v in (8000, 128256)}
    found |= {f"rows bf16, {k} targets": row_variant(bf16, bf16, targets=k) for k in (2, 4)}
    for name, logits in (("bf16", bf16), ("fp32 -> bf16", fp32)):
        found[f"rows {name}, soft cap"] = row_variant(logits, bf16, cap=True)
        found[f"rows {name}, bias, soft cap, smoothing"] = row_variant(logits, bf16, **everything)
        found[f"rows {name}, bias, soft cap, smoothing, 2 targets"] = row_variant(logits, bf16, targets=2, **everything)
        found[f"rows {name}, gradient only"] = row_variant(logits, bf16, describe=False)
    found["rows fp32, statistics only"] = row_variant(fp32, fp32, grad=False)
    found["rows fp32, statistics only, bias, soft cap"] = row_variant(fp32, fp32, grad=False, bias=True, cap=True)
    for name, values, always in (("scale bf16", "*bf16", False), ("scale fp16 -> bf16", "*fp16", True)):
        kinds, constants = {"values": values, "out": "*bf16", "count": "i64"}, {"BLOCK": BLOCK, "ALWAYS": always}
        found[name] = _source(scale_kernel, kinds, constants, {"values", "out", "count"}), {"num_warps": 4, "enable_fp_fusion": True}
    return found


def examine(source: ASTSource, options: dict[str, int]) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, widths of global loads and stores, and whether rows have 64-bit offsets."""
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    accesses = {kind: [_bits(m) for m in re.findall(rf"{kind}\.global(\.[^ ]+)", ptx)] for kind in ("ld", "st")}
    with tempfile.TemporaryDirectory() as folder:
        source_file = Path(folder) / "kernel.ptx"
        source_file.write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
        done = subprocess.run([_ptxas(), "-v", f"--gpu-name={arch}", str(source_file), "-o", f"{folder}/kernel.cubin"],
                              capture_output=True, text=True, check=True)
    return {"warps": options["num_warps"], "registers": int(re.search(r"Used (\d+) registers", done.stderr).group(1)),
            "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)), "shared": compiled.metadata.shared,
            "loads_128": sum(b >= 128 for b in accesses["ld"]), "stores_128": sum(b >= 128 for b in accesses["st"]),
            "loads": len(accesses["ld"]), "stores": len(accesses["st"]),
            "narrow_vectors": sum(b < 128 for kind in ("ld", "st") for b in (_bits(m) for m in re.findall(rf"{kind}\.global(\.v[^ ]+)", ptx))),
            "wide_offsets": _wide_offsets(ptx)}


def _wide_offsets(ptx: str) -> bool:
    """Whether the program's number meets a stride in 64 bits, and never in 32."""
    row = re.search(r"mov\.u32\s+(%r\d+), %ctaid\.x", ptx).group(1)
    wide = re.findall(rf"cvt\.u64\.u32\s+(%rd\d+), {row};", ptx)
    product = wide and re.search(rf"mul\.lo\.s64\s+%rd\d+, (%rd\d+, {wide[0]}|{wide[0]}, %rd\d+);", ptx)
    return bool(product) and not re.search(rf"(mul|mad)\.lo\.[su]32\s+%r\d+, (%r\d+, )?{row}[,;]", ptx)


def _bits(modifiers: str) -> int:
    """Width of a PTX access such as .v4.b32."""
    vector = re.search(r"\.v(\d)", modifiers)
    return int(re.search(r"\.[a-z]+(\d+)$", modifiers).group(1)) * (int(vector.group(1)) if vector else 1)


def _ptxas() -> str:
    """The assembler that triton itself would take for this target."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(TARGET.arch).path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    found = {name: examine(*variant) for name, variant in variants().items()}
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"triton {triton.__version__}, sm_90\n")
    print("| kernel | warps | registers | spilled bytes | shared bytes | 128-bit loads | 128-bit stores |\n|---|---|---|---|---|---|---|")
    for name, f in found.items():
        print(f"| {name} | {f['warps']} | {f['registers']} | {f['spilled']} | {f['shared']} | {f['loads_128']} of {f['loads']} | {f['stores_128']} of {f['stores']} |")


if __name__ == "__main__":
    main()
