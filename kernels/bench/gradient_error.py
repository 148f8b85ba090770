"""Error of the matrix gradient by number of chunks.

`python -m kernels.bench.gradient_error [--tokens N] [--json FILE]`.

bf16 inputs, bf16 logits and logit gradients as on a GPU, products summed in fp32 and rounded once
per chunk, as cuBLAS and the CPU path both do. Relative Frobenius norm of the difference from fp64.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from kernels.bench.machine import describe_machine, write_json
from kernels.cross_entropy.chunking import Sums
from kernels.cross_entropy.fused import Problem, run
from kernels.cross_entropy.ops import scalar_coefficients


def inputs(
    tokens: int, width: int, vocabulary: int, realistic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bf16 hidden and weight whose logits have a standard deviation of 1.4, and targets.

    realistic: hidden states share a mean and targets follow Zipf's law, as in text; independent and
    uniform otherwise, where sums of gradients grow like a random walk.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens, 1), generator=generator)
    if realistic:
        hidden = (hidden + torch.randn(width, generator=generator)) / 2**0.5
        targets = torch.multinomial(
            1 / torch.arange(1, vocabulary + 1).double(), tokens, True, generator=generator
        ).unsqueeze(1)
    weight = torch.randn(vocabulary, width, generator=generator) * 1.4 / width**0.5
    return hidden.bfloat16(), weight.bfloat16(), targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the matrix gradient in fp64."""
    g = torch.softmax(hidden.double() @ weight.double().T, -1)
    g.scatter_add_(1, targets, -torch.ones_like(targets, dtype=torch.float64))
    return g.T @ hidden.double()


def error(
    hidden: Tensor, weight: Tensor, targets: Tensor, expected: Tensor, chunks: int, sums: Sums
) -> float:
    """Return the relative error of our matrix gradient, summed over `chunks`.

    "result": in bf16, which no mode does.
    """
    rows = -(-hidden.shape[0] // chunks)
    p = Problem(hidden, weight, None, targets, None, rows, sums, False, "torch")
    _, gradients = run(
        p,
        (False, True, False),
        scalar_coefficients(torch.ones(targets.shape), 0.0, 0.0, weight.shape[0]),
    )
    assert gradients.weight is not None
    return float((gradients.weight.double() - expected).norm() / expected.norm())


def table(
    tokens: int, width: int, vocabulary: int, counts: list[int]
) -> dict[str, dict[str, float]]:
    """Return {inputs, sums: {chunks: error}}."""
    sums_by_name: dict[str, Sums] = {"bf16": "result", "fp16": "fp16", "fp32": "fp32"}
    errors = {}
    for name, realistic in (("independent", False), ("like text", True)):
        case = inputs(tokens, width, vocabulary, realistic)
        expected = exact(*case)
        for label, sums in sums_by_name.items():
            errors[f"{name}, {label}"] = {str(k): error(*case, expected, k, sums) for k in counts}
    return errors


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.gradient_error", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--json", type=Path, help="also write the results there")
    arguments = parser.parse_args()
    counts = [1, 2, 4, 8, 16, 32, 64]
    measured = table(arguments.tokens, arguments.width, arguments.vocabulary, counts)
    machine = describe_machine("cpu")
    print(
        f"{', '.join(f'{k} {v}' for k, v in machine.items())}; {arguments.tokens} x"
        f" {arguments.width} x {arguments.vocabulary}\n"
    )
    print(f"| chunks | {' | '.join(measured)} |\n|{'---|' * (len(measured) + 1)}")
    for k in map(str, counts):
        print(f"| {k} | {' | '.join(f'{errors[k]:.4f}' for errors in measured.values())} |")
    write_json(arguments.json, {"machine": machine, "errors": measured})


if __name__ == "__main__":
    main()
