"""A rank that holds a slice of the vocabulary and saves its loss and gradients.

`python -m tests.support.vocabulary_ranks FOLDER` writes FOLDER/rank-N.pt.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from kernels.cross_entropy.vocabulary_parallel import slice_of, vocabulary_parallel_cross_entropy
from tests.support.loss_cases import Case, make_case

CASES = {
    "plain": ({"n": 13, "v": 53}, {}),
    "many targets": ({"n": 13, "v": 53, "targets": 3}, {"z_loss_coefficient": 1e-2}),
    "everything": (
        {"n": 13, "v": 54, "bias": True, "peaked": True},
        {"z_loss_coefficient": 1e-2, "softcap": 5.0, "label_smoothing": 0.1},
    ),
    "large logits": ({"n": 13, "v": 53, "scale": 160.0}, {}),
    "bf16": ({"n": 13, "v": 53, "dtype": torch.bfloat16}, {}),
}
UPSTREAM, WEIGHT_SUM, CHUNK = 0.7, 5.0, 4


def build(name: str) -> tuple[Case, dict]:
    shape, options = CASES[name]
    return make_case(**shape), options


def run(name: str, implementation: str, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    case, options = build(name)
    vocabulary = case.weight.shape[0]
    mine = slice_of(vocabulary, dist.get_rank(group), dist.get_world_size(group))
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach()[mine.start : mine.stop].clone().requires_grad_()
    bias = (
        None
        if case.bias is None
        else case.bias.detach()[mine.start : mine.stop].clone().requires_grad_()
    )
    out = vocabulary_parallel_cross_entropy(
        hidden,
        weight,
        case.targets,
        vocabulary=vocabulary,
        group=group,
        bias=bias,
        weight_sum=WEIGHT_SUM,
        token_weights=case.token_weights,
        chunk_tokens=CHUNK,
        implementation=implementation,
        **options,
    )
    (out.loss * UPSTREAM).backward()
    results = {
        "dX": hidden.grad,
        "dW": weight.grad,
        "nats": out.nats,
        "lse": out.lse,
        "hits": out.hits,
        "z_loss": out.z_loss,
        "loss": out.loss.detach(),
    }
    return results if bias is None else results | {"db": bias.grad}


def refusals(group: dist.ProcessGroup) -> list[str]:
    """Messages of four misuses.

    A slice of the wrong size, a target outside the whole vocabulary, fp16, a second backward pass.
    """
    hidden, targets, messages = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 1]), []
    for width, target, dtype in (
        (9, 0, torch.float32),
        (10, 99, torch.float32),
        (10, 0, torch.float16),
    ):
        try:
            vocabulary_parallel_cross_entropy(
                hidden.to(dtype),
                torch.zeros(width, 4, dtype=dtype),
                targets + target,
                vocabulary=20,
                group=group,
            )
        except ValueError as error:
            messages.append(str(error))
    loss = vocabulary_parallel_cross_entropy(
        hidden, torch.zeros(10, 4), targets, vocabulary=20, group=group
    ).loss
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        messages.append(str(error))
    return messages


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    group = dist.new_group(list(range(dist.get_world_size())))
    results = {
        f"{name}, {kernel}": run(name, kernel, group)
        for name in CASES
        for kernel in ("torch", "triton")
        if (name, kernel) != ("bf16", "triton")
    }
    torch.save(
        {"results": results, "refusals": refusals(group)}, f"{folder}/rank-{dist.get_rank()}.pt"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
