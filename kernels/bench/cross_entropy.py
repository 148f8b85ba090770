"""Benchmark of the fused loss beside its peers.

`python -m kernels.bench.cross_entropy [--shapes NxDxV ...] [--json FILE]`.

Forward and backward, all providers in turn within each round, so that clocks and neighbours are the
same for all; medians. The floor is the three matrix products of the definition alone (6 N D V
FLOPs), timed in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench.machine import describe_machine, measure_peak, time_in_turn, write_json
from kernels.cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
GPU_SHAPES = (
    "8192x4096x128256",
    "16384x2048x248320",
    "8192x2304x256000",
    "1024x4096x128256",
    "8192x2048x50304",
)
CPU_SHAPES = ("4096x512x50304",)
SLICE = 512  # entries of the vocabulary and tokens whose gradients are compared with fp64


def eager(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    """Compute the mean cross-entropy through all logits.

    Liger's reference (TorchLMHeadCE of its tests) is the same computation.
    """
    return F.cross_entropy(F.linear(x, w).float(), t)


def ours(**options: Any) -> Loss:
    """Return our loss with options of linear_cross_entropy."""
    return lambda x, w, t: linear_cross_entropy(x, w, t, **options).loss


def providers(device: str) -> dict[str, Loss]:
    """Return the losses that can run on the device, by name."""
    losses: dict[str, Loss] = {"nextpt": ours()}
    if device == "cuda":
        losses |= {
            "nextpt, small": ours(gradient="small"),
            "nextpt, fp32 logits": ours(logits_dtype=torch.float32),
        }
    losses |= {"torch eager": eager, "torch.compile": torch.compile(eager)}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch F.linear_cross_entropy"] = lambda x, w, t: F.linear_cross_entropy(x, w, t)
        chunked = torch.nn.LinearCrossEntropyOptions()
        losses["torch F.linear_cross_entropy, chunked"] = lambda x, w, t: F.linear_cross_entropy(
            x, w, t, options=chunked
        )
    return losses | (_triton_peers() if device == "cuda" else {})


def _triton_peers() -> dict[str, Loss]:
    """Liger 0.8.5, CCE 25.1, QuACK 0.6, where installed; none of them has a CPU path."""
    losses: dict[str, Loss] = {}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        losses["Liger, default"] = lambda x, w, t: _first(Liger.apply(x, w, t))
        for factor in (8, 16):
            losses[f"Liger, chunks x {factor}"] = _liger_with_chunks(factor)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        losses["CCE, filtered"] = lambda x, w, t: cce(x, w, t)
        losses["CCE, exact"] = lambda x, w, t: cce(x, w, t, filter_eps=None)
    except ImportError:
        pass
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

        losses["QuACK"] = lambda x, w, t: quack(x, w, t, reduction="mean")
    except ImportError:
        pass
    return losses


def _first(result: Any) -> Tensor:
    loss: Tensor = result[0] if isinstance(result, tuple) else result
    return loss


def _liger_with_chunks(factor: int) -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Liger,
    )

    # Its defaults; chunk_mem_const is the last
    masks, smoothing = (None, None, -100), (0.0, 0.0, "mean", None)
    rest = (*masks, *smoothing, False, None, False, False, False, None, None, factor)
    return lambda x, w, t: _first(Liger.apply(x, w, t, *rest))


def inputs(
    n: int, d: int, v: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and targets of a benchmark.

    Hidden has unit variance, logits a standard deviation of 1.4; targets are uniform, a tenth of
    them ignored.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, generator=generator, device=device, dtype=dtype)
    w = torch.randn(v, d, generator=generator, device=device, dtype=dtype).mul_(1.4 / d**0.5)
    t = torch.randint(0, v, (n,), generator=generator, device=device)
    t[torch.rand(n, generator=generator, device=device) < 0.1] = -100
    return x.requires_grad_(), w.requires_grad_(), t


def step(loss: Loss, x: Tensor, w: Tensor, t: Tensor) -> None:
    """Compute the loss and its gradients."""
    x.grad = w.grad = None
    torch.autograd.backward(loss(x, w, t))


def products(x: Tensor, w: Tensor) -> Callable[[], None]:
    """Return the three products alone, in chunks of tokens that fit beside the gradients."""
    rows = min(x.shape[0], 4096)
    x, w = x.detach(), w.detach()
    logits = torch.empty(rows, w.shape[0], dtype=x.dtype, device=x.device)
    dx = torch.empty_like(x)
    dw = torch.empty_like(w)

    def run() -> None:
        for part in torch.split(x, rows):
            out = logits[: part.shape[0]]
            torch.mm(part, w.T, out=out)
            torch.mm(out, w, out=dx[: part.shape[0]])
            torch.mm(out.T, part, out=dw)

    return run


def exact_slices(x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return dX of the first tokens and dW of the first entries, in fp64."""
    wide, valid = w.detach().double(), t != -100
    column = torch.where(valid, t, 0)
    dx = []
    dw = torch.zeros(min(SLICE, w.shape[0]), w.shape[1], dtype=torch.float64, device=w.device)
    for first in range(0, x.shape[0], SLICE):
        part = slice(first, first + SLICE)
        rows = x.detach()[part].double()
        g = torch.softmax(rows @ wide.T, -1)
        g.scatter_add_(1, column[part].unsqueeze(1), -torch.ones_like(g[:, :1]))
        g *= (valid[part] / valid.sum()).unsqueeze(1)
        dw += g[:, : dw.shape[0]].T @ rows
        dx += [g @ wide] if first == 0 else []
    return dx[0], dw


def error(gradient: Tensor | None, exact: Tensor) -> float:
    """Return the relative error of the first rows of a gradient."""
    assert gradient is not None
    part = gradient[: exact.shape[0]].double()
    return float((part - exact).norm() / exact.norm())


def compare(shape: str, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure time, memory and errors of all providers at a shape NxDxV."""
    n, d, v = map(int, shape.split("x"))
    x, w, t = inputs(n, d, v, device, dtype)
    exact = exact_slices(x, w, t)
    table: dict[str, dict[str, Any]] = {}
    jobs: dict[str, Callable[[], None]] = {"three products": products(x, w)}
    for name, loss in providers(device).items():
        job = partial(step, loss, x, w, t)
        try:
            job()  # compiles, and warms up
            x.grad = w.grad = None
            peak = measure_peak(device, job)
            table[name] = {
                "peak_mib": peak / 2**20,
                "dx_error": error(x.grad, exact[0]),
                "dw_error": error(w.grad, exact[1]),
            }
            jobs[name] = job
        except Exception as problem:  # a peer that fails is a result too
            message = str(problem).splitlines()[0] if str(problem) else ""
            table[name] = {"failed": f"{type(problem).__name__}: {message}"}
        x.grad = w.grad = None
    times = time_in_turn(jobs, rounds, device)
    floor = times["three products"]
    for name, seconds in times.items():
        table.setdefault(name, {}).update(ms=1000 * seconds, to_floor=seconds / floor)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "tflops": 6e-12 * n * d * v / floor,
        "providers": table,
    }


def show(result: dict[str, Any]) -> None:
    """Print a table of one shape."""
    print(
        f"\n{result['shape']} {result['dtype']}: floor of 6 N D V at {result['tflops']:.3g}"
        " TFLOP/s\n"
    )
    print(
        "| provider | ms | to the floor | peak MiB | dX error | dW error"
        " |\n|---|---|---|---|---|---|"
    )
    for name, f in sorted(
        result["providers"].items(), key=lambda item: item[1].get("ms", float("inf"))
    ):
        if "failed" in f:
            print(f"| {name} | failed: {f['failed'][:80]} | | | | |")
            continue
        extra = (
            f"{f['peak_mib']:.0f} | {f['dx_error']:.1e} | {f['dw_error']:.1e}"
            if "peak_mib" in f
            else " | | "
        )
        print(f"| {name} | {f['ms']:.1f} | {f['to_floor']:.2f} | {extra} |")


def main() -> None:
    """Measure the shapes, print tables, write JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.cross_entropy", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=GPU_SHAPES if device == "cuda" else CPU_SHAPES,
        metavar="NxDxV",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16" if device == "cuda" else "float32",
        choices=("bfloat16", "float16", "float32"),
    )
    parser.add_argument("--rounds", type=int, default=20 if device == "cuda" else 5)
    parser.add_argument("--json", type=Path, help="also write the results there")
    arguments = parser.parse_args()
    machine = describe_machine(device)
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    results = []
    for shape in arguments.shapes:
        results.append(compare(shape, device, getattr(torch, arguments.dtype), arguments.rounds))
        show(results[-1])
    write_json(arguments.json, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
