"""Muon's step does not depend on how ZeRO divides the parameters, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nextpt.config import OptimizerSection
from nextpt.optim import matrix_exchange, muon
from nextpt.optim.guarded import Shard
from nextpt.optim.muon import Muon
from nextpt.train.zero_layout import zero_layout
from tests.support.rank_threads import ThreadGroup

SECTION = OptimizerSection(
    kind="muon",
    lr=0.02,
    grad_clip=0.5,
    muon={"normuon_beta": 0.9, "cautious_weight_decay": True, "newton_schulz_steps": 3},
)
SHAPES = {
    "blocks.0.q_proj.weight": (10, 7),
    "blocks.0.norm.weight": (7,),
    "blocks.0.down_proj.weight": (7, 23),
    "blocks.1.q_proj.weight": (10, 7),
    "blocks.1.up_proj.weight": (23, 7),
    "blocks.1.k_proj.weight": (1, 7),
    "norm.weight": (7,),
}
BAD_STEP, STEPS = 1, 4

Whole = dict[tuple[str, str], Tensor]


def whole(name: str, step: int) -> Tensor:
    """Flat gradient of a step, or the weights for step -1."""
    chance = torch.Generator().manual_seed(1000 * step + sorted(SHAPES).index(name) + 7000)
    values = torch.randn(math.prod(SHAPES[name]), generator=chance)
    return torch.full_like(values, torch.nan) if step == BAD_STEP else values


class Rank:
    """One rank of a layout: its flat tensors as DeepSpeed makes them, and the optimizer.

    Args:
        stage: ZeRO stage.
        rank: This rank.
        group: All ranks.
    """

    def __init__(self, stage: int, rank: int, group: ThreadGroup) -> None:
        spec, step = Muon(SECTION), [0]
        self.step = step
        units, shards, groups = [], [], []
        for unit in zero_layout(spec, SHAPES, stage, group.size):
            pieces = [(t, piece) for t in unit for piece in t.pieces if piece.rank == rank]
            sizes = [piece.length for _, piece in pieces]
            # At stage 0 parameters are stepped themselves, later they are parts of a flat tensor
            flats = [torch.zeros(size) for size in (sizes if stage == 0 else [sum(sizes) + 2])]
            for number, (tensor, piece) in enumerate(pieces):
                flat = flats[number if stage == 0 else 0]
                offset = 0 if stage == 0 else sum(sizes[:number])
                shards.append(
                    Shard(tensor.name, tensor.shape, flat, offset, piece.start, piece.length)
                )
            units.append(flats)
            own = spec.group_of(unit[0].name, unit[0].shape)
            groups.append({"params": flats, "name": own.name, **own.options})
        self.shards = shards
        self.optimizer = spec.build(
            groups, lambda: (torch.tensor(2.0), torch.tensor(step[0] == BAD_STEP))
        )
        self.optimizer.attach([flat for unit in units for flat in unit], shards)
        self.optimizer.connect(SHAPES, units, group)  # type: ignore[arg-type]
        for flat in (flat for unit in units for flat in unit):
            flat.grad = torch.zeros_like(flat)
        self.fill(-1, gradients=False)

    def fill(self, step: int, gradients: bool) -> None:
        """Give every shard its part of the gradient of a step, or of the weights."""
        for shard in self.shards:
            target = shard.flat.grad if gradients else shard.flat
            shard.view(target).copy_(whole(shard.name, step)[shard.start :][: shard.length])

    def train(self) -> list[tuple[str, str, int, Tensor]]:
        """Make all steps, one of them bad; the state as (parameter, kind, start, values)."""
        for step in range(STEPS):
            self.step[0] = step
            before = self.state() if step == BAD_STEP else []
            self.fill(step, gradients=True)
            self.optimizer.step()
            for old, new in zip(before, self.state(), strict=False):
                assert torch.equal(old[3], new[3]), old[:2]
        return self.state()

    def state(self) -> list[tuple[str, str, int, Tensor]]:
        fragments = []
        rank = self.optimizer.owner
        for shard in self.shards:
            fragments.append((shard.name, "weight", shard.start, shard.view(shard.flat).clone()))
            for kind in self.optimizer.kinds(shard):
                values = self.optimizer.shard_state(shard)[kind.name].clone()
                if kind.is_elementwise(shard.shape):
                    fragments.append((shard.name, kind.name, shard.start, values))
                else:
                    fragments.append((shard.name, f"{kind.name} {rank(shard.name)}", 0, values))
        return fragments


def train(monkeypatch: pytest.MonkeyPatch, stage: int, ranks: int, dtype: torch.dtype) -> Whole:
    """The whole state after training, by (parameter, kind)."""
    group = ThreadGroup(ranks)
    with monkeypatch.context() as patched:
        for module in (matrix_exchange, muon):
            patched.setattr(module, "dist", group)
        patched.setattr(muon, "exchange_dtype", lambda device_type: dtype)
        states = group.run(lambda rank: Rank(stage, rank, group).train())
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for rank, state in enumerate(states):
        for name, kind, start, values in state:
            kind, _, owner = kind.partition(" ")
            if owner in ("", str(rank)):
                parts.setdefault((name, kind), {})[start] = values
    return {key: torch.cat([own[start] for start in sorted(own)]) for key, own in parts.items()}


@pytest.fixture(scope="module")
def references() -> dict[torch.dtype, Whole]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {dtype: train(monkeypatch, 0, 1, dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("limit", [1, 2**25])
def test_the_layout_changes_no_bit(
    references: dict[torch.dtype, Whole],
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    ranks: int,
    dtype: torch.dtype,
    limit: int,
) -> None:
    rounds: Any = matrix_exchange.rounds
    monkeypatch.setattr(muon, "rounds", lambda assignments: rounds(assignments, limit))
    expected, state = references[dtype], train(monkeypatch, stage, ranks, dtype)
    assert state.keys() == expected.keys()
    for (name, kind), values in state.items():
        # torch's fused AdamW rounds the last elements of a tensor otherwise than those before
        is_matrix = name.endswith("proj.weight")
        tolerance = {"rtol": 0.0, "atol": 0.0} if is_matrix else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(values, expected[name, kind], **tolerance)


def test_it_trains(references: dict[torch.dtype, Whole]) -> None:
    state = references[torch.float32]
    assert {kind for _, kind in state} == {
        *("weight", "momentum", "row_square", "exp_avg", "exp_avg_sq")
    }
    for (name, kind), values in state.items():
        assert values.isfinite().all() and values.any(), (name, kind)
        if kind == "weight":
            assert not torch.equal(values, whole(name, -1))
