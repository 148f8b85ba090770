"""Bounds of attention's speed from its compiled code alone: an estimate, which needs no GPU.

`python -m kernels.bench.roofline [--target sm_90] [--json]`

Of the loop over whole tiles of each kernel, the instructions are counted by the pipe that executes
them, and divided by what a multiprocessor does in a cycle. Two bounds follow, as shares of the
tensor cores' peak. In the first all pipes overlap, and the slowest sets the time. In the second
nothing does: the tensor cores wait for the slowest of the other pipes and it for them, as in a
block that is alone on its multiprocessor and whose warps meet in each iteration. Waits for memory
are in neither.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource

from kernels.attention.tiles_triton import Shape
from kernels.bench.compile_report import TARGETS
from kernels.bench.variants import variants

# In a cycle of a multiprocessor: operations of the tensor cores on 16-bit types with sums in fp32
# (NVIDIA's papers on A100, GA102, Ada, H100 and Blackwell; GeForce cards of sm_86, 89 and 120 do
# half), then threads' instructions in fp32, exponentials, others, bytes of shared memory and warps'
# instructions issued (CUDA C++ Programming Guide, throughput of native arithmetic instructions)
MATRIX = {
    "sm_80": 2048,
    "sm_86": 1024,
    "sm_89": 1024,
    "sm_90": 4096,
    "sm_100": 8192,
    "sm_120": 1024,
}
FP32 = dict.fromkeys(MATRIX, 128) | {"sm_80": 64}
EXPONENTIALS, OTHERS, SHARED, ISSUED = 16, 64, 128, 4
# Of sm_90's peak, by instructions of single warps (arXiv 2402.13499)
MMA_SYNC = 0.629
# Products of a tile by pass: of the width of keys, of that of values
PRODUCTS = {"forward": (1, 1), "keys": (2, 2), "queries": (2, 1)}
_WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
Instruction = tuple[str, str]  # name, operands


class Cycles(NamedTuple):
    """Cycles of a multiprocessor for one iteration of a block, by pipe.

    Attributes:
        useful: what the tensor cores need for the products of one tile.
        matrix: what they take: some warps may compute the same, and with wgmma they read shared
            memory themselves.
        exponential: exponentials.
        fp32: sums and products in fp32.
        others: all other instructions of threads.
        shared: shared memory to and from registers.
        issue: instructions of warps.
    """

    useful: float
    matrix: float
    exponential: float
    fp32: float
    others: float
    shared: float
    issue: float

    @property
    def overlapped(self) -> float:
        """Share of the tensor cores' peak where all pipes overlap."""
        return self.useful / max(self[1:])

    @property
    def serial(self) -> float:
        """Share of the tensor cores' peak where they wait for the slowest of the other pipes."""
        return self.useful / (self.matrix + max(self[2:]))


def disassemble(source: ASTSource, options: dict[str, Any], target: str) -> str:
    """Return the machine code of a kernel as text."""
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        return subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def tile_loops(code: str) -> list[list[Instruction]]:
    """Return the innermost loops that multiply matrices and take exponentials, as instructions."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    spans = []
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = number
        jump = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if jump and jump.group(1) in labels:
            spans.append((labels[jump.group(1)], number + 1))
    bodies = {span: "\n".join(lines[slice(*span)]) for span in spans}
    spans = [span for span in spans if "MMA" in bodies[span] and "MUFU.EX2" in bodies[span]]
    return [
        [(m[1], m[2]) for line in lines[start:stop] if (m := _INSTRUCTION.search(line))]
        for start, stop in spans
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans)
    ]


def matrix_operations(name: str) -> int:
    """Operations of one warp's instruction on the tensor cores; 0 for others."""
    if match := _WGMMA.match(name):
        m, n, k = map(int, match.groups())
        return 2 * m * n * k // 4  # of four warps together
    return 2 * 16 * 8 * 16 if name.startswith("HMMA.16816") else 0


def operand_bytes(name: str, operands: str) -> float:
    """Bytes that the tensor cores read from shared memory for one warp's instruction."""
    match = _WGMMA.match(name)
    if match is None:
        return 0
    m, n, k = map(int, match.groups())
    left = 0 if re.match(r"\s*R\d+, R\d+", operands) else m * k
    return 2 * (left + n * k) / 4


def shared_bytes(name: str) -> float:
    """Bytes that one warp's instruction moves between shared memory and its registers."""
    if re.match(r"(LDSM|STSM)\b", name):
        matrices = re.search(r"\.M88\.([24])", name)
        return 128 * (int(matrices.group(1)) if matrices else 1)
    if re.match(r"(LDS|STS|LDGSTS)\b", name):
        width = re.search(r"\.(128|64|U16|U8)\b", name)
        return 32 * {"128": 16, "64": 8, "U16": 2, "U8": 1}.get(width.group(1) if width else "", 4)
    return 0


def cycles_of(body: list[Instruction], warps: int, target: str, operations: float) -> Cycles:
    """Divide a loop's instructions by the throughput of each pipe.

    Args:
        body: Instructions of one warp.
        warps: Of the block.
        target: A key of `MATRIX`.
        operations: Of the tensor cores on one tile. Instructions of sm_100 do not say how many
            they do; theirs are taken to be these.
    """
    names = [name.split(".")[0] for name, _ in body]
    threads = 32 * warps
    exponentials = names.count("MUFU")
    fp32 = sum(names.count(name) for name in ("FADD", "FMUL", "FFMA"))
    uniform = sum(name.startswith("U") for name in names)  # once for a warp, in a pipe of their own
    memory = [shared_bytes(name) for name, _ in body]
    read = sum(operand_bytes(*instruction) for instruction in body)
    products = sum("MMA" in name for name in names)
    waits = sum(name in {"BAR", "WARPGROUP", "BRA", "DEPBAR", "LDGDEPBAR", "NOP"} for name in names)
    used = exponentials + fp32 + uniform + sum(b > 0 for b in memory) + products + waits
    done = warps * sum(matrix_operations(name) for name, _ in body) or operations
    reached = MMA_SYNC if target == "sm_90" and "HMMA" in names else 1.0
    return Cycles(
        operations / MATRIX[target],
        max(done / (reached * MATRIX[target]), read * warps / SHARED),
        exponentials * threads / EXPONENTIALS,
        fp32 * threads / FP32[target],
        max(len(body) - used, 0) * threads / OTHERS,
        sum(memory) * warps / SHARED,
        len(body) * warps / ISSUED,
    )


def tile_operations(kind: str, shape: Shape) -> int:
    """Operations of the tensor cores on one tile of queries and keys, with padded widths."""
    of_keys, of_values = PRODUCTS[kind]
    width = of_keys * shape.BLOCK_D + of_values * shape.BLOCK_V
    return 2 * shape.BLOCK_M * shape.BLOCK_N * width


def measure(name: str, target: str) -> Cycles:
    """Return the cycles of the loop over whole tiles: the shortest that multiplies matrices."""
    source, options = variants(TARGETS[target])[name]
    constant = next(value for value in source.constants.values() if isinstance(value, tuple))
    shape = Shape._make(getattr(field, "value", field) for field in constant)
    body = min(tile_loops(disassemble(source, options, target)), key=len)
    operations = tile_operations(name.split()[1].rstrip(","), shape)
    cycles = cycles_of(body, options["num_warps"], target, operations)
    if cycles.matrix < cycles.useful:
        raise ValueError(f"{name}: the loop has fewer products than a tile")
    return cycles


def backward(keys: float, queries: float) -> float:
    """Share of peak of the backward pass, in the five products that are counted as its work.

    Args:
        keys: Share of the gradient of keys, which has four products.
        queries: Share of the gradient of queries, which has three.
    """
    return 5 / (4 / keys + 3 / queries)


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.roofline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--target", choices=MATRIX, default="sm_90")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    target = arguments.target
    table = {}
    for width in (64, 128, 256):
        for kind in PRODUCTS:
            cycles = measure(f"attention {kind}, D={width}", target)
            shares = {"overlapped": cycles.overlapped, "serial": cycles.serial}
            table[f"{kind}, D={width}"] = cycles._asdict() | shares
        keys, queries = (table[f"{kind}, D={width}"] for kind in ("keys", "queries"))
        table[f"backward, D={width}"] = {
            bound: backward(keys[bound], queries[bound]) for bound in ("overlapped", "serial")
        }
    if arguments.json:
        print(json.dumps(table))
        return
    print(f"triton {triton.__version__}, {target}: cycles of an iteration, and bounds\n")
    columns = [*Cycles._fields, "all overlap", "nothing overlaps"]
    print(f"| kernel | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, values in table.items():
        numbers = [f"{values[field]:,.0f}" if field in values else "" for field in Cycles._fields]
        bounds = [f"{values[bound]:.0%}" for bound in ("overlapped", "serial")]
        print(f"| {name} | {' | '.join(numbers + bounds)} |")


if __name__ == "__main__":
    main()
