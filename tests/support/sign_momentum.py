"""A second optimizer with other kinds of state, known to these tests only, on real ranks.

`python -m tests.support.sign_momentum JOBS.json OUT` under RANK, ... runs one job after another and
writes their results to OUT on rank 0:

    {"train": config}                  trains or resumes a run; its error or null
    {"reload": config, "to": folder}   loads the run's newest checkpoint and saves it again
    {"bad step": config}               makes a good, a bad and a good step
    {"average": config}                computes with an average of the weights, and fails in it
    {"weights": config}                makes three steps with the same data on every rank

each with "kind": optimizer.kind, this one where it is left out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import xxhash
from torch import Tensor

from nextpt.base.collective import RankGroup
from nextpt.base.errors import UserError
from nextpt.checkpoint.commit import save
from nextpt.checkpoint.selection import open_checkpoint
from nextpt.config import Config, OptimizerSection, load_config
from nextpt.optim.per_parameter import PerParameterSpec
from nextpt.optim.registry import OPTIMIZERS
from nextpt.optim.spec import ParameterGroup, Shape, StateKind, one_value
from nextpt.train import engine as engine_module
from nextpt.train.checkpointing import restore_engine
from nextpt.train.engine import Engine
from nextpt.train.process_group import start_distributed
from nextpt.train.run import run_training

KIND = "sign_momentum"
COOLING = 0.1


class SignMomentum(PerParameterSpec):
    """signSGD with momentum (arXiv 1802.04434) for matrices, whose steps shrink with their age.

    Matrices have a momentum and an age: the number of their updates, one value per parameter.
    Vectors have no state.
    """

    kind = KIND
    matrices = ParameterGroup("matrices", (StateKind("momentum"), StateKind("age", one_value)))
    vectors = ParameterGroup("vectors", ())

    @property
    def groups(self) -> Sequence[ParameterGroup]:
        return self.vectors, self.matrices

    def group_of(self, name: str, shape: Shape) -> ParameterGroup:
        return self.matrices if len(shape) >= 2 else self.vectors

    def update(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, Any],
        updates: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not state:
            return weight - options["lr"] * gradient.sign(), {}
        momentum = torch.lerp(gradient, state["momentum"], self.section.betas[0])
        size = options["lr"] / (1 + COOLING * state["age"])
        return weight - size * momentum.sign(), {"momentum": momentum, "age": state["age"] + 1}

    def last_update(
        self,
        weight: Tensor,
        state: Mapping[str, Tensor],
        options: Mapping[str, float],
        updates: float,
    ) -> Tensor:
        if not state:
            return torch.full_like(weight, options["lr"])
        return options["lr"] / (1 + COOLING * (state["age"] - 1)) * state["momentum"].sign()


class SignMomentumSection(OptimizerSection):
    """Section `optimizer` of the tests' config."""

    kind: Literal["adamw", "muon", "sign_momentum"] = "adamw"  # type: ignore[assignment]


def register() -> None:
    """Make the optimizer known to this process."""
    OPTIMIZERS[KIND] = SignMomentum
    Config.model_fields["optimizer"].annotation = SignMomentumSection
    Config.model_rebuild(force=True)


def load(job: dict[str, Any]) -> Config:
    path = job[next(iter(job))]
    return load_config(path, [f"optimizer.kind={job.get('kind', KIND)}"])


def train(job: dict[str, Any], device: torch.device) -> str | None:
    try:
        run_training(load(job))
    except UserError as error:
        return str(error)
    return None


def reload(job: dict[str, Any], device: torch.device) -> None:
    """Load and save again, without a step between."""
    config, group = load(job), RankGroup.world()
    engine = Engine(config, device)
    checkpoint = open_checkpoint(config.run_dir / "checkpoints")
    restore_engine(engine, checkpoint, group)
    extras = {"step": checkpoint.step, "config": config.model_dump(mode="json")}
    save(Path(job["to"]), engine.state, extras, {}, group)


def digest(engine: Engine, *, working: bool = True) -> str:
    """Hash of master weights, optimizer state and, where asked, working weights of this rank."""
    total = xxhash.xxh3_128(json.dumps(engine.state.scalars()).encode())
    for fragment in engine.state.fragments():
        total.update(f"{fragment.name} {fragment.kind}".encode())
        total.update(fragment.tensor.numpy().tobytes())
    for parameter in engine.model.parameters() if working else ():
        total.update(getattr(parameter, "ds_tensor", parameter).detach().float().numpy().tobytes())
    return total.hexdigest()


def bad_step(job: dict[str, Any], device: torch.device) -> dict[str, list[Any]]:
    """Digests after a good step, a step whose loss is NaN, and a good one; reasons of the steps."""
    from tests.support.dynamics_probe import batch_of, local_weight_sum, population

    engine, sequences, digests = Engine(load(job), device), population(), []
    loss = engine_module.next_token_loss
    for bad in (False, True, False):
        batches = [batch_of(sequences[2 * i : 2 * i + 2]) for i in range(4)]

        def spoiled(*arguments: Any, bad: bool = bad, **options: Any) -> Any:
            result = loss(*arguments, **options)
            return result._replace(loss=result.loss * (float("nan") if bad else 1.0))

        with patch.object(engine_module, "next_token_loss", spoiled):
            engine.step(batches, engine.all_reduce(local_weight_sum(batches)), 1e-2)
        digests.append(digest(engine))
    reasons = [verdict.reason for verdict in engine.spike_detector.read()]
    every = RankGroup.world().all_gather(digests)
    return {"digests": every, "reasons": reasons, "ratios": [engine.update_ratios()]}


def average(job: dict[str, Any], device: torch.device) -> list[dict[str, list[str]]]:
    """Digests by rank, with the working weights and without them.

    Of the state after two steps, with the average in the place of the weights, after it, and after
    an exception in it.
    """
    from tests.support.dynamics_probe import batch_of, local_weight_sum, population

    engine, sequences = Engine(load(job), device), population()
    for start in (0, 8):
        batches = [batch_of(sequences[start + 2 * i : start + 2 * i + 2]) for i in range(4)]
        engine.step(batches, engine.all_reduce(local_weight_sum(batches)), 1e-2)
    digests: dict[str, list[str]] = {"all": [], "saved": []}

    def record() -> None:
        digests["all"].append(digest(engine))
        digests["saved"].append(digest(engine, working=False))

    record()
    with engine.state.averaged_weights(0.9):
        record()
    record()
    with suppress(ValueError), engine.state.averaged_weights(0.9):
        raise ValueError
    record()
    return RankGroup.world().all_gather(digests)


def joined(parts: list[tuple[int, list[float]]]) -> str:
    """Digest of a tensor in parts, in order."""
    values = [value for _, part in parts for value in part]
    return xxhash.xxh3_64(json.dumps(values).encode()).hexdigest()


def weights(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Three steps of equal batches on every rank.

    Returns:
        The losses, a digest of every kind of state of every parameter, and by rank what it sent by
        all-to-all in the last step and which part it holds of every parameter.
    """
    from tests.support.dynamics_probe import batch_of, local_weight_sum, population
    from tests.support.traffic_probe import Collectives

    config = load(job)
    engine, rows, losses = Engine(config, device), population(), []
    for step in range(3):
        batches = [batch_of(rows[2 * step : 2 * step + 2])]
        batches *= config.accumulation_steps(engine.world_size)
        weight_sum = engine.all_reduce(local_weight_sum(batches))
        collectives = Collectives()
        with collectives:
            results = engine.step(batches, weight_sum, 1e-2)
        losses.append(sum(float(result.loss) for result in results) * engine.world_size)
    ranks, whole = RankGroup.world(), {}
    fragments = [[f.name, f.kind, f.start, f.tensor.tolist()] for f in engine.state.fragments()]
    for name, kind, start, values in sorted(f for own in ranks.all_gather(fragments) for f in own):
        whole.setdefault(f"{name} {kind}", []).append((start, values))
    sent = sum(size for (kind, _), size in collectives.sent.items() if kind == "all_to_all")
    return {
        "losses": losses,
        "digests": {key: joined(parts) for key, parts in whole.items()},
        "sent": ranks.all_gather(sent),
        "shards": ranks.all_gather([[s.name, s.start, s.length] for s in engine.state.shards()]),
    }


JOBS = {
    "train": train,
    "reload": reload,
    "bad step": bad_step,
    "average": average,
    "weights": weights,
}


def main(jobs: str, out: str) -> None:
    register()
    device = start_distributed()
    results = [JOBS[next(iter(job))](job, device) for job in json.loads(Path(jobs).read_text())]
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
