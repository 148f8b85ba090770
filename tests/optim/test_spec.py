"""OptimizerSpec: kinds of state, memory, and the step of an optimizer that is a pure function."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from nextpt.config import OptimizerSection
from nextpt.optim.adamw import AdamW
from nextpt.optim.guarded import GuardedOptimizer, Shard
from nextpt.optim.registry import OPTIMIZERS, optimizer_spec
from nextpt.optim.spec import StateKind, Verdict, like_parameter, one_value
from tests.support.datasets import tiny
from tests.support.sign_momentum import SignMomentum

SECTION = OptimizerSection(lr=0.5, betas=(0.5, 0.9), grad_clip=2.0)
SHAPES = {"embed_tokens.weight": (8, 4), "norm.weight": (4,)}


def test_the_config_knows_every_optimizer() -> None:
    kinds = get_args(OptimizerSection.model_fields["kind"].annotation)
    assert set(kinds) == OPTIMIZERS.keys()
    assert all(OPTIMIZERS[kind].kind == kind for kind in kinds)
    assert isinstance(optimizer_spec(tiny(Path("none"), Path("none"))), AdamW)


def test_state_takes_the_bytes_of_its_kinds() -> None:
    assert AdamW(SECTION).state_bytes(SHAPES) == 8 * (32 + 4)
    assert SignMomentum(SECTION).state_bytes(SHAPES) == 4 * (32 + 1)
    half = StateKind("half", like_parameter, torch.bfloat16)
    assert half.dtype.itemsize == 2 and half.is_elementwise((3,))
    assert not StateKind("age", one_value).is_elementwise((3,))


@pytest.mark.parametrize("name", ["weight", "step"])
def test_invalid_names_of_kinds_of_state_are_refused(name: str) -> None:
    with pytest.raises(AssertionError, match=name):
        StateKind(name)


def attached(model: nn.Module, verdict: Verdict) -> GuardedOptimizer:
    """The optimizer of a model whose parameters it steps themselves, as at ZeRO stage 0."""
    spec, named = SignMomentum(SECTION), dict(model.named_parameters())
    optimizer = spec.build(spec.torch_groups(named.items()), verdict)
    optimizer.attach(
        named.values(),
        [Shard(name, tuple(p.shape), p, 0, 0, p.numel()) for name, p in named.items()],
    )
    return optimizer


def test_gradients_are_clipped_before_the_update() -> None:
    model = nn.Linear(3, 2)
    norm = torch.tensor(8.0)
    optimizer = attached(model, lambda: (norm, torch.tensor(False)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    [momentum] = [s["momentum"] for s in optimizer.state.values() if "momentum" in s]
    assert torch.equal(momentum, torch.full((2, 3), (1 - 0.5) * 3.0 * 2.0 / 8.0))


def test_padding_is_not_stepped() -> None:
    """A flat tensor may end with padding that belongs to no parameter."""
    flat = torch.ones(10)
    spec = SignMomentum(SECTION)
    optimizer = spec.build([{"params": [flat]}], lambda: (torch.tensor(1.0), torch.tensor(False)))
    optimizer.attach([flat], [Shard("a", (4, 2), flat, 1, 2, 5)])
    flat.grad = torch.ones(10)
    optimizer.step()
    assert torch.equal(flat, torch.tensor([1.0, *[0.5] * 5, *[1.0] * 4]))
    assert optimizer.whole_state["a"]["age"] == 1 and optimizer.scalars() == {
        "optimizer_updates": 1.0
    }


def test_a_state_of_nothing_but_padding_has_every_kind() -> None:
    flat = torch.ones(4)
    optimizer = AdamW(SECTION).build(
        [{"params": [flat], "weight_decay": 0.0}],
        lambda: (torch.tensor(1.0), torch.tensor(False)),
    )
    optimizer.attach([flat], [])
    assert optimizer.state[flat].keys() == {"step", "exp_avg", "exp_avg_sq"}
    flat.grad = torch.zeros(4)
    optimizer.step()
    assert optimizer.scalars() == {"optimizer_updates": 1.0}
