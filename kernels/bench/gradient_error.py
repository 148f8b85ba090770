"""Error of the matrix gradient by number of chunks: `python -m kernels.bench.gradient_error [--tokens N] [--json FILE]`.

bf16 inputs, bf16 logits and logit gradients as on a GPU, products summed in fp32 and rounded once per chunk, as
cuBLAS and the CPU path both do. Relative Frobenius norm of the difference from fp64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from kernels.bench.machine import describe_machine
from kernels.cross_entropy.fused import Problem, run
from kernels.cross_entropy.ops import scalar_coefficients


def inputs(tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 hidden and weight whose logits have a standard deviation of 1.4; every target occurs."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, width, generator=generator) * 1.4 / width**0.5).bfloat16()
    return hidden, weight, torch.randint(0, vocabulary, (tokens, 1), generator=generator)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    g = torch.softmax(hidden.double() @ weight.double().T, -1)
    g.scatter_add_(1, targets, -torch.ones_like(targets, dtype=torch.float64))
    return g.T @ hidden.double()


def error(hidden: Tensor, weight: Tensor, targets: Tensor, expected: Tensor, chunks: int, accumulator: bool) -> float:
    """Relative error of our matrix gradient, summed over `chunks` in fp32 (accumulator) or in bf16."""
    rows = -(-hidden.shape[0] // chunks)
    p = Problem(hidden, weight, None, targets, None, rows, accumulator, False, "torch")
    _, gradients = run(p, (False, True, False), scalar_coefficients(torch.ones(targets.shape), 0.0, 0.0, weight.shape[0]))
    return float((gradients.weight.double() - expected).norm() / expected.norm())


def table(tokens: int, width: int, vocabulary: int, counts: list[int]) -> dict[str, dict[str, float]]:
    """{mode: {chunks: error}}."""
    case = inputs(tokens, width, vocabulary)
    expected = exact(*case)
    return {mode: {str(k): error(*case, expected, k, wide) for k in counts} for mode, wide in (("bf16", False), ("fp32", True))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench.gradient_error", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="also write the results there")
    arguments = parser.parse_args()
    counts = [1, 2, 4, 8, 16, 32, 64]
    found = table(arguments.tokens, arguments.width, arguments.vocabulary, counts)
    machine = describe_machine("cpu")
    print(f"{', '.join(f'{k} {v}' for k, v in machine.items())}; {arguments.tokens} x {arguments.width} x {arguments.vocabulary}\n")
    print("| chunks | summed in bf16 | summed in fp32 |\n|---|---|---|")
    for k in map(str, counts):
        print(f"| {k} | {found['bf16'][k]:.4f} | {found['fp32'][k]:.4f} |")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine, "errors": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
