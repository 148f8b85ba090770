"""Training jobs with faults in losses and gradients, one after another in each rank's process.

`python -m tests.support.guard_probe JOBS.json OUT` reads a list of jobs and writes OUT-RANK.json
with the result of each. Keys of a job:

    config: path of the config
    faults: [[kind, data step, rank or null for all], ...]; data steps count from 0 in data order
    never: [data step, ...], batches that this job does not read
    differs: rank whose spike detector gets the gradient norm times ten thousand from step 7 on
    events: [[function, n, event], ...] at the n-th call of a function: "term" (SIGTERM), "kill"
        (SIGKILL to rank 1) or "die" (an unexpected exception on all ranks)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import xxhash

import nextpt.train.engine as engine_module
from nextpt.base.errors import TrainingStopped, UserError
from nextpt.checkpoint.manager import CheckpointManager
from nextpt.config import load_config
from nextpt.data.loader import Loader
from nextpt.objective import Loss
from nextpt.train import run
from nextpt.train.engine import Engine
from nextpt.train.loop import Trainer
from nextpt.train.zero_state import ZeroState
from tests.support.job_probe import before
from tests.support.signals import send_signal

PLACES = {
    "fragments": (ZeroState, "fragments"),
    "batches": (Loader, "step_batches"),
    "rollback": (CheckpointManager, "rollback"),
    "save": (CheckpointManager, "save"),
}


class Killed(BaseException):
    """Simulated kill: no handler of training catches it."""


class Faults:
    """Changes losses of chosen data steps: of the second micro-batch or, without a rank, all."""

    def __init__(self, faults: list[list[Any]], never: list[int]) -> None:
        self.faults, self.never, self.data_step, self.micro = faults, sorted(never), -1, 0
        self.read, self.loss = Loader._read_step, engine_module.next_token_loss

    def step_batches(self, original: Any) -> Any:
        def wrapped(loader: Loader, step: int) -> Any:
            self.data_step = self.moved(
                loader.position(step) // loader.config.train.global_batch_size
            )
            self.micro = 0
            return original(loader, step)

        return wrapped

    def moved(self, step: int) -> int:
        for gone in self.never:
            step += step >= gone
        return step

    def read_step(self, loader: Loader, step: int) -> Any:
        return self.read(loader, self.moved(step))

    def next_token_loss(self, *arguments: Any, **options: Any) -> Loss:
        loss = self.loss(*arguments, **options)
        if not torch.is_grad_enabled():
            return loss
        self.micro += 1
        for kind, step, rank in self.faults:
            if step == self.data_step and (
                rank is None or (rank == int(os.environ["RANK"]) and self.micro == 2)
            ):
                loss = loss._replace(loss=spoil(kind, loss.loss))
        return loss


def spoil(kind: str, total: torch.Tensor) -> torch.Tensor:
    factor = {"nan": float("nan"), "inf": float("inf")}.get(kind)
    if factor is not None:
        return total * factor
    if kind == "loss":
        return total + 5.0
    total = total.clone()
    total.register_hook(
        lambda g: (
            g * {"gradient nan": float("nan"), "gradient inf": float("inf"), "gradient": 10.0}[kind]
        )
    )
    return total


def digest(engine: Engine) -> str:
    """Hash of master weights, moments, update count and working weights of this rank."""
    hasher = xxhash.xxh3_128()
    for fragment in engine.state.fragments():
        hasher.update(fragment.tensor.numpy().tobytes())
    for parameter in engine.model.parameters():
        hasher.update(getattr(parameter, "ds_tensor", parameter).detach().float().numpy().tobytes())
    hasher.update(json.dumps(engine.state.scalars()).encode())
    return hasher.hexdigest()


def at(name: str, when: int, event: str) -> Any:
    def action(n: int) -> None:
        if n == when and event == "term":
            send_signal(signal.SIGTERM)
        elif n == when and event == "kill":
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
        elif n == when:
            raise Killed

    return before(*PLACES[name], action)


def do(job: dict[str, Any]) -> dict[str, Any]:
    faults, digests = Faults(job.get("faults", []), job.get("never", [])), []
    train_step, outcome = Trainer.train_step, ["finished", "", 0]

    def step(trainer: Trainer, number: int, measure: bool = False) -> Any:
        result = train_step(trainer, number, measure)
        if job.get("digests"):
            digests.append([number + 1, digest(trainer.context.engine)])
        return result

    with ExitStack() as stack:
        stack.enter_context(patch.object(engine_module, "next_token_loss", faults.next_token_loss))
        stack.enter_context(
            patch.object(Loader, "step_batches", faults.step_batches(Loader.step_batches))
        )
        stack.enter_context(
            patch.object(
                Loader, "_read_step", lambda loader, number: faults.read_step(loader, number)
            )
        )
        stack.enter_context(patch.object(Trainer, "train_step", step))
        if job.get("host checks"):
            stack.enter_context(
                patch.object(
                    engine_module.deepspeed_api, "disable_host_gradient_checks", start_host_checks
                )
            )
        if job.get("differs") == int(os.environ["RANK"]):
            stack.enter_context(
                patch.object(
                    engine_module.SpikeDetector,
                    "classify",
                    larger_norms(engine_module.SpikeDetector.classify),
                )
            )
        for event in job.get("events", []):
            stack.enter_context(at(*event))
        try:
            run.run_training(load_config(job["config"]))
        except (UserError, TrainingStopped) as error:
            outcome = [type(error).__name__, str(error), error.exit_code]
        except (RuntimeError, Killed) as error:
            outcome = [type(error).__name__, str(error), 1]
    return {"outcome": outcome, "digests": digests}


def larger_norms(record: Any) -> Any:
    calls: list[int] = []

    def record_larger(
        self: Any, loss: torch.Tensor, z_loss: torch.Tensor, norm: torch.Tensor
    ) -> torch.Tensor:
        calls.append(1)
        return record(self, loss, z_loss, norm * 1e4 if len(calls) > 6 else norm)

    return record_larger


def start_host_checks() -> None:
    """Have DeepSpeed look at the norm on the host again, as it comes."""
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, stage3, stage_1_and_2):
        module.is_invalid_grad_norm = utils.is_invalid_grad_norm


def main(jobs: str, out: str) -> None:
    results = [do(job) for job in json.loads(Path(jobs).read_text())]
    Path(f"{out}-{os.environ['RANK']}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
