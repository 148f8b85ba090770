"""A rank that counts the traffic of an optimizer step: bytes per collective and on the wire."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nextpt.train.deepspeed_config
import nextpt.train.memory
from nextpt.config import Config, load_config
from nextpt.data.batch import Batch
from nextpt.objective import local_weight_sum
from nextpt.train.engine import Engine
from nextpt.train.process_group import start_distributed

# Collective of torch -> (its name in this file, passes over the data of the larger side that a
# ring makes, in units of (N - 1) / N).
KINDS = {
    "allreduce_": ("all_reduce", 2),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_": ("all_gather", 1),
    "reduce_": ("reduce", 1),
    "broadcast_": ("broadcast", 1),
    "alltoall_base_": ("all_to_all", 1),
}
SMALL = 4096  # bytes up to which a collective carries a loss or a norm, not the model
STEPS = 2
BUCKET = 1_000_000  # elements
FIRST_BLOCK = "first block"


class Collectives(TorchDispatchMode):
    """Counts collectives while it is entered.

    Attributes:
        sent: (kind, ranks of the group) -> bytes that each of its ranks sends by ring algorithms.
        order: Kinds in the order in which they began, and FIRST_BLOCK when the backward pass came
            to the first block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.order: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        namespace, _, name = str(function).partition(".")
        if namespace == "c10d" and (name := name.split(".")[0]) in KINDS:
            kind, passes = KINDS[name]
            group = next(
                a
                for a in args
                if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
            )
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
            sizes = [
                sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor))
                for a in args[:2]
            ]
            if kind == "all_to_all":
                # (output, input, group, sizes of the output's parts, of the input's, ...)
                to_others = [
                    n for rank, n in zip(ranks, args[4], strict=True) if rank != dist.get_rank()
                ]
                self.sent[kind, ranks] += sum(to_others) * args[1].itemsize
            elif max(sizes) > SMALL:
                self.sent[kind, ranks] += passes * max(sizes) * (len(ranks) - 1) // len(ranks)
                self.order.append(kind)
        return function(*args, **(kwargs or {}))


def wire() -> int:
    """Bytes that this host has sent to others."""
    return sum(
        c.bytes_sent for name, c in psutil.net_io_counters(pernic=True).items() if name != "lo"
    )


def batch_of(config: Config, rank: int) -> Batch:
    """A micro-batch of random tokens in whole sequences."""
    count, length = config.train.micro_batch_size, config.data.sequence_length
    sequences = torch.randint(
        0,
        config.model.vocab_size,
        (count, length + 1),
        generator=torch.Generator().manual_seed(rank),
    )
    nothing = torch.zeros(count, length, dtype=torch.int32)
    return Batch(
        tokens=sequences[:, :-1],
        targets=sequences[:, 1:],
        position_ids=torch.arange(length).expand(count, -1),
        document_ids=nothing,
        token_weights=torch.ones(count, length),
        target_bytes=nothing,
        is_text=nothing == 0,
        domain_ids=torch.zeros(count, dtype=torch.long),
        sequence_numbers=torch.arange(count),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * length,
    )


def counted(config: Config, device: torch.device) -> dict[str, Any]:
    """Traffic of a step after the first steps built buffers and recorded the layers' order."""
    engine = Engine(config, device)
    batches = [batch_of(config, engine.rank)] * config.accumulation_steps(engine.world_size)
    weights = engine.all_reduce(local_weight_sum(batches))
    losses = [float(engine.step(batches, weights, 1e-3)[-1].loss) for _ in range(2)]
    dist.barrier()
    collectives, before = Collectives(), wire()
    hook = next(iter(engine.model.blocks[0].parameters())).register_hook(
        lambda gradient: collectives.order.append(FIRST_BLOCK)
    )
    with collectives:
        losses += [float(engine.step(batches, weights, 1e-3)[-1].loss) for _ in range(STEPS)]
    dist.barrier()
    hook.remove()
    return {
        "losses": losses,
        "wire": (wire() - before) / STEPS,
        "order": collectives.order,
        "sent": [
            {"kind": kind, "ranks": list(ranks), "bytes": sent / STEPS}
            for (kind, ranks), sent in sorted(collectives.sent.items())
        ],
    }


def main(out: str, *configs: str) -> None:
    # As for a model far larger than the limit on gathered parameters.
    nextpt.train.deepspeed_config.LIVE_PARAMETERS = 1
    nextpt.train.memory.REDUCE_BUCKET = BUCKET
    device = start_distributed()
    counts = [counted(load_config(path, []), device) for path in configs]
    Path(f"{out}-{dist.get_rank()}.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
