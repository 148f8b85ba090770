"""Benchmark of attention beside its peers, on a GPU.

`python -m kernels.bench.attention [--json FILE] [--plot FILE.svg]`.

Causal bf16, 16k tokens in all; forward, backward and both, all providers in turn within each round,
medians. TFLOP/s count 4 D per visible pair of query and key forward and 2.5 times that backward, as
the literature does; the rate of a large matrix product in the same rounds is the ceiling.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import PackedDocuments, attention
from kernels.attention.trial import document_lengths
from kernels.bench.machine import describe_machine, time_in_turn, write_json
from kernels.choice import ATTENTION

TOKENS = 16384
# 2048 columns of heads; D=64 at 4096 tokens without groups is the shape of Triton's fused-attention
# tutorial.
SHAPES = [
    (d, s, group)
    for d in (64, 128, 256)
    for s in (1024, 2048, 4096, 8192, 16384, 32768)
    for group in (1, 8)
]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def backend(name: str) -> Attend:
    """Return torch's attention by one of its backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                is_causal=True,
                enable_gqa=q.shape[2] != k.shape[2],
            ).transpose(1, 2)

    return run


def ours(implementation: str, documents: PackedDocuments | None) -> Attend:
    """Return our attention by an implementation."""
    return lambda q, k, v: attention(q, k, v, documents=documents, implementation=implementation)


def providers(documents: PackedDocuments | None) -> dict[str, Attend]:
    """Return the attentions that can run, by name."""
    functions = {"nextpt": ours("triton", documents)}
    if documents is None:
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            functions[f"SDPA {name.split('_')[0].lower()}"] = backend(name)
    else:
        functions["SDPA with a mask"] = ours("sdpa", documents)
    for name in ("varlen", "flex", "flash_attn"):
        if not ATTENTION[name].refusals("cuda"):
            functions[name] = ours(name, documents)
    return functions


def pack(lengths: list[int], rows: int) -> PackedDocuments:
    """Return documents of the same lengths in every row."""
    sizes = torch.tensor(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), sizes).int().cuda()
    starts = F.pad(sizes.repeat(rows).cumsum(0), (1, 0)).int().cuda()
    return PackedDocuments(ids.expand(rows, -1).contiguous(), starts)


def compare(
    width: int, length: int, group: int, rounds: int, packed: bool = False
) -> dict[str, Any]:
    """Measure TFLOP/s forward, backward and both, per provider."""
    rows, heads = max(TOKENS // length, 1), 2048 // width
    g = torch.Generator("cuda").manual_seed(0)

    def draw(count: int) -> Tensor:
        shape = rows, length, count, width
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

    q, d_out = draw(heads).requires_grad_(), draw(heads)
    k, v = (draw(max(heads // group, 1)).requires_grad_() for _ in range(2))
    lengths = document_lengths(length) if packed else [length]
    documents = pack(lengths, rows) if packed else None
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    flops = 4 * rows * heads * width * pairs
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    jobs: dict[str, Callable[[], object]] = {"product": lambda: square @ square}
    table: dict[str, Any] = {}
    for name, run in providers(documents).items():
        try:
            out = run(q, k, v)
            backward = partial(torch.autograd.grad, out, (q, k, v), d_out, retain_graph=True)
            backward()
        except Exception as problem:  # a peer that fails is a result too
            message = str(problem).splitlines()[0] if str(problem) else ""
            table[name] = {"failed": f"{type(problem).__name__}: {message}"}
            continue
        jobs[f"{name}|forward"] = partial(run, q, k, v)
        jobs[f"{name}|backward"] = backward
    times = time_in_turn(jobs, rounds, "cuda")
    for name in dict.fromkeys(job.split("|")[0] for job in jobs if "|" in job):
        seconds = times[f"{name}|forward"], times[f"{name}|backward"]
        table[name] = {
            "forward": 1e-12 * flops / seconds[0],
            "backward": 2.5e-12 * flops / seconds[1],
            "both": 3.5e-12 * flops / sum(seconds),
        }
    return {
        "width": width,
        "length": length,
        "group": group,
        "packed": packed,
        "product": 2e-12 * 8192**3 / times["product"],
        "providers": table,
    }


def show(result: dict[str, Any]) -> None:
    """Print a table of one shape."""
    kind = "packed documents" if result["packed"] else "causal"
    print(
        f"\nD={result['width']}, {result['length']} tokens a row, {result['group']} query heads per"
        f" key head, {kind}; matrix product {result['product']:.0f} TFLOP/s\n\n| TFLOP/s | forward"
        " | backward | both | ours to it, both |\n|---|---|---|---|---|"
    )
    ours = result["providers"].get("nextpt", {}).get("both")
    for name, f in result["providers"].items():
        if "failed" in f:
            print(f"| {name} | failed: {f['failed'][:80]} | | | |")
            continue
        ratio = f"{ours / f['both']:.2f}" if ours else ""
        print(f"| {name} | {f['forward']:.0f} | {f['backward']:.0f} | {f['both']:.0f} | {ratio} |")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot both passes over the length of rows: a panel per width, causal, without groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for panel, width in enumerate((64, 128, 256)):
        axes = figure.add_subplot(1, 3, panel + 1)
        chosen = [r for r in results if r["width"] == width and r["group"] == 1 and not r["packed"]]
        for name in dict.fromkeys(n for r in chosen for n in r["providers"]):
            points = [
                (r["length"], r["providers"][name]["both"])
                for r in chosen
                if "both" in r["providers"].get(name, {})
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axes.set(
            xscale="log", xlabel="tokens a row", ylabel="TFLOP/s, both passes", title=f"D = {width}"
        )
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Measure the shapes, print tables, write JSON and a plot."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.attention", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--plot", type=Path, help="also draw them there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a GPU; on a CPU attention is torch's own")
    machine = describe_machine("cuda")
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    results = []
    shapes = [(*shape, False) for shape in SHAPES]
    shapes += [(128, length, 1, True) for length in (4096, 16384)]
    for width, length, group, packed in shapes:
        results.append(compare(width, length, group, arguments.rounds, packed))
        show(results[-1])
    write_json(arguments.json, {"machine": machine, "results": results})
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
