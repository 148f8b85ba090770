"""Muon: momentum orthogonalized by Newton-Schulz, for the matrices of blocks; AdamW for the rest.

Keller Jordan's optimizer (kellerjordan.github.io/posts/muon) under ZeRO, with the same result
however the parameters are divided. Of a matrix W with gradient G, by `optimizer.muon`:

    M <- mu M + (1 - mu) G
    U  = mu M + (1 - mu) G        (Nesterov; otherwise M)
    O  = orthogonalize(U)         (NorMuon: rows divided by their root mean square, |O| kept)
    W <- W - lr weight_decay W - lr scale O

All but the third line is elementwise and happens where ZeRO keeps the elements, in fp32. The third
needs whole matrices: each is gathered on one rank, its owner, and the result is divided again
(`matrix_exchange.py`). Matrices are never computed in batches: the shape of a product, and with it
the order of its sums, must not depend on what a rank owns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from nextpt.config import MuonSection, OptimizerSection
from nextpt.model import Parametrization
from nextpt.optim.adamw import AdamW
from nextpt.optim.guarded import GuardedOptimizer, Shard, squared_norm
from nextpt.optim.matrix_exchange import (
    Assignment,
    DividedTensor,
    Piece,
    Round,
    assign,
    rounds,
    sent_elements,
)
from nextpt.optim.newton_schulz import (
    iteration,
    newton_schulz_flops,
    orthogonalize,
    update_scale,
)
from nextpt.optim.spec import ParameterGroup, Shape, StateKind, StepCost, Verdict

MATRICES = "muon"  # name of the group
LEAST_SQUARE = 1e-10  # of a row's elements, for NorMuon


def one_per_row(shape: Shape) -> Shape:
    """Shape of a state with one value per row of a matrix."""
    return shape[:1]


def exchange_dtype(device_type: str) -> torch.dtype:
    """Dtype that matrices are orthogonalized in, and travel in.

    bf16 is enough for the iteration (kellerjordan.github.io/posts/muon). On CPUs its products are
    slow, and not the same for every thread count.
    """
    return torch.bfloat16 if device_type == "cuda" else torch.float32


class Muon(AdamW):
    """Muon for the matrices of blocks; AdamW for embedding, output matrix, norms and biases.

    Gates of whole heads are AdamW's too: each row is a gate by itself, and orthogonalization would
    make the updates of all heads' gates equally large.
    """

    kind = "muon"

    def __init__(self, section: OptimizerSection, rules: Parametrization | None = None) -> None:
        super().__init__(section, rules)
        assert section.muon is not None
        self.muon: MuonSection = section.muon
        kinds = [StateKind("momentum")]
        if self.muon.normuon_beta is not None:
            kinds.append(StateKind("row_square", one_per_row))
        decay = self.muon.weight_decay
        decay = section.weight_decay if decay is None else decay
        factors = self.rules.muon(self.muon.scale)
        self._groups["matrices"] = ParameterGroup(
            MATRICES,
            tuple(kinds),
            {"weight_decay": decay * factors.weight_decay},
            (self.muon.lr or section.lr) / section.lr * factors.lr,
        )

    def is_matrix(self, name: str, shape: Shape) -> bool:
        """Whether Muon steps the parameter."""
        return self.group_of(name, shape).name == MATRICES

    def build(self, groups: list[dict[str, Any]], verdict: Verdict) -> GuardedOptimizer:
        """The optimizer of all groups."""
        return OrthogonalizedMomentum(groups, self, verdict)

    def flops(self, shape: Shape) -> float:
        """FLOPs of the orthogonalization of a matrix."""
        return newton_schulz_flops(shape, self.muon.newton_schulz_steps)

    def assignments(self, unit: Sequence[DividedTensor]) -> list[Assignment]:
        """Owners of the matrices that are exchanged together."""
        return assign((t for t in unit if self.is_matrix(t.name, t.shape)), self.flops)

    def step_cost(
        self, units: Iterable[Sequence[DividedTensor]], ranks: int, device_type: str
    ) -> StepCost:
        """FLOPs of orthogonalization and bytes of the exchange."""
        flops, sent = [0.0] * ranks, [0] * ranks
        for unit in units:
            assignments = self.assignments(unit)
            for assignment in assignments:
                flops[assignment.owner] += self.flops(assignment.tensor.shape)
            sent = [a + b for a, b in zip(sent, sent_elements(assignments, ranks), strict=True)]
        size = exchange_dtype(device_type).itemsize
        return StepCost(tuple(flops), tuple(size * elements for elements in sent))


class OrthogonalizedMomentum(GuardedOptimizer):
    """Steps matrices by Muon and other parameters by torch's fused AdamW, clipped and guarded.

    It takes additional memory for the matrices of one `Round`. Its name must not contain "muon":
    DeepSpeed 0.19 recognises its own optimizer by that.
    """

    spec: Muon

    def __init__(self, groups: list[dict[str, Any]], spec: Muon, verdict: Verdict) -> None:
        super().__init__(groups, {"lr": spec.section.lr})
        self.guard(spec, verdict)
        self.iteration = iteration(spec.muon.coefficients, spec.muon.newton_schulz_steps)
        self._is_connected = False
        self._held: dict[str, Shard] = {}
        self._owners: dict[str, int] = {}
        self._rounds: dict[int, list[Round]] = {}  # by unit
        self._unit_of: dict[Tensor, int] = {}
        # Squared norm of the last update of what this rank holds of a matrix; NaN before the first
        self._update_squares: dict[str, Tensor] = {}

    def connect(
        self,
        shapes: Mapping[str, Shape],
        units: Sequence[Sequence[Tensor]],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Learn how the matrices are divided and assign their owners. See the base class."""
        self._unit_of = {flat: number for number, unit in enumerate(units) for flat in unit}
        for shard in (shard for shards in self.shards.values() for shard in shards):
            if self.spec.is_matrix(shard.name, shard.shape):
                self._held[shard.name] = shard
                nan = torch.full((), torch.nan, dtype=torch.float64, device=shard.flat.device)
                self._update_squares[shard.name] = nan
        device = next(flat.device for unit in units for flat in unit)
        self.dtype = exchange_dtype(device.type)
        self._like = torch.empty(0, dtype=self.dtype, device=device)
        rank = 0 if group is None else dist.get_rank(group)
        for number, unit in self._divided_units(shapes, device, group).items():
            assignments = self.spec.assignments(unit)
            self._owners |= {a.tensor.name: a.owner for a in assignments}
            self._rounds[number] = [Round(part, rank, group) for part in rounds(assignments)]
        self._is_connected = True

    def _divided_units(
        self, shapes: Mapping[str, Shape], device: torch.device, group: dist.ProcessGroup | None
    ) -> dict[int, list[DividedTensor]]:
        """Unit -> its matrices, with the pieces of all ranks. Collective."""
        names = [name for name, shape in shapes.items() if self.spec.is_matrix(name, shape)]
        own = torch.zeros(len(names), 3, dtype=torch.int64)  # unit, start, length
        for row, name in zip(own, names, strict=True):
            if shard := self._held.get(name):
                values = (self._unit_of[shard.flat], shard.start, shard.length)
                row.copy_(torch.tensor(values))
        tables = [own]
        if group is not None:
            tables = [
                torch.empty_like(own, device=device) for _ in range(dist.get_world_size(group))
            ]
            dist.all_gather(tables, own.to(device), group=group)
        divided: dict[int, list[DividedTensor]] = {}
        by_matrix = torch.stack(tables).transpose(0, 1).tolist()
        for name, rows in zip(names, by_matrix, strict=True):
            held = [(rank, *row) for rank, row in enumerate(rows) if row[2]]
            pieces = tuple(Piece(rank, start, length) for rank, _, start, length in held)
            divided.setdefault(held[0][1], []).append(DividedTensor(name, shapes[name], pieces))
        return divided

    def owner(self, name: str) -> int | None:
        """Rank that orthogonalizes a matrix and keeps its `row_square`."""
        return self._owners.get(name)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Update every parameter that has a gradient, unless the step is bad. Collective."""
        norm, bad = self.verdict()
        # An engine may make a step while it is built, before there is any state.
        if not self._is_connected:
            return
        factor = self.clip_factor(norm, bad)
        for group in self.param_groups:
            flats = [flat for flat in group["params"] if flat.grad is not None]
            if flats and group["name"] == MATRICES:
                self._step_matrices(group, flats, factor, bad)
            elif flats:
                self._step_adamw(group, flats, factor, bad)

    def _step_adamw(
        self, group: Mapping[str, Any], flats: list[Tensor], factor: Tensor, bad: Tensor
    ) -> None:
        states = [self.state[flat] for flat in flats]
        beta1, beta2 = group["betas"]
        adamw(
            flats,
            [flat.grad for flat in flats],  # type: ignore[misc]  # none is None
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=factor,
            found_inf=bad.float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(
        self, group: Mapping[str, Any], flats: list[Tensor], factor: Tensor, bad: Tensor
    ) -> None:
        # Bad steps take part in the exchange too: no rank needs the verdict on the host.
        for part in self._rounds.get(self._unit_of[flats[0]], []):
            momenta, inputs = {}, {}
            for name in part.held:
                gradient = self._gradient(name, factor)
                momenta[name] = self._mix(self._momentum(name), gradient)
                if name in part.sources:
                    is_nesterov = self.spec.muon.nesterov
                    mixed = self._mix(momenta[name], gradient) if is_nesterov else momenta[name]
                    inputs[name] = mixed.to(self.dtype)
            whole = part.gather(inputs, self._like)
            results = {
                tensor.name: self._orthogonalize(tensor.name, whole.pop(tensor.name), bad)
                for tensor in part.owned
            }
            for name, piece in part.scatter(results, self._like).items():
                self._apply(name, piece.float(), group, bad)
                self._momentum(name).copy_(torch.where(bad, self._momentum(name), momenta[name]))
        for flat in flats:
            self.state[flat]["step"] += ~bad

    def _mix(self, average: Tensor, gradient: Tensor) -> Tensor:
        momentum = self.spec.muon.momentum
        return average * momentum + gradient * (1 - momentum)

    def _gradient(self, name: str, factor: Tensor) -> Tensor:
        shard = self._held[name]
        assert shard.flat.grad is not None
        return shard.view(shard.flat.grad) / factor

    def _momentum(self, name: str) -> Tensor:
        shard = self._held[name]
        return shard.view(self.state[shard.flat]["momentum"])

    def _orthogonalize(self, name: str, matrix: Tensor, bad: Tensor) -> Tensor:
        result = orthogonalize(matrix, self.iteration)
        beta = self.spec.muon.normuon_beta
        if beta is None:
            return result
        rows, square = result.float(), self.whole_state[name]["row_square"]
        new_square = square * beta + rows.square().mean(dim=1) * (1 - beta)
        scaled = rows / new_square.clamp(min=LEAST_SQUARE).sqrt()[:, None]
        scaled *= rows.norm() / scaled.norm().clamp(min=LEAST_SQUARE)
        square.copy_(torch.where(bad, square, new_square))
        return scaled.to(result.dtype)

    def _apply(self, name: str, result: Tensor, group: Mapping[str, Any], bad: Tensor) -> None:
        """Update this rank's piece of a matrix by its piece of the orthogonalized one, fp32 [n]."""
        shard, lr = self._held[name], group["lr"]
        weight = shard.view(shard.flat)
        decay = weight * (lr * group["weight_decay"])
        if self.spec.muon.cautious_weight_decay:
            decay = torch.where(result * weight >= 0, decay, 0.0)
        update = result * (lr * update_scale(self.spec.muon.scale, shard.shape)) + decay
        # Selected, not multiplied: 0 * NaN is NaN.
        weight.copy_(torch.where(bad, weight, weight - update))
        square = self._update_squares[name]
        square.copy_(torch.where(bad, square, squared_norm(update)))

    def last_update_squares(self, shard: Shard, lr: float, updates: float) -> Tensor:
        """Squared norms of the last update and of the weights; NaN before the first update."""
        held = self._held.get(shard.name)
        if held is None:
            return super().last_update_squares(shard, lr, updates)
        # Where several ranks hold the same, each counts its own share of it
        update = self._update_squares[shard.name] * (shard.length / held.length)
        return torch.stack([update, squared_norm(shard.view(shard.flat))])

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Continue from the scalars of a checkpoint; the last update is not known."""
        super().load_scalars(scalars)
        for square in self._update_squares.values():
            square.fill_(torch.nan)
