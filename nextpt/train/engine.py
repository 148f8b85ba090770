"""Engine: one optimizer step on one rank, on top of DeepSpeed, with its verdict on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextpt.config import Config, ObjectiveSection
from nextpt.data.batch import Batch
from nextpt.model import Decoder, build_decoder
from nextpt.objective import Loss, next_token_loss
from nextpt.optim.registry import optimizer_spec
from nextpt.parallel.mesh import Mesh
from nextpt.train import deepspeed_api
from nextpt.train.deepspeed_config import deepspeed_config
from nextpt.train.dynamics import GradientNoise, update_ratios
from nextpt.train.spike_detector import SpikeDetector
from nextpt.train.weight_averages import AveragedState


class TrainingModule(nn.Module):
    """What the engine wraps: a model whose forward returns the loss."""

    def __init__(self, model: Decoder, objective: ObjectiveSection) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, weight_sum: Tensor) -> Loss:
        """Loss of a micro-batch, divided by the weight sum of the whole optimizer step."""
        return next_token_loss(
            self.model,
            batch,
            weight_sum,
            self.objective.z_loss_coefficient,
            mtp_weight=self.objective.mtp_weight,
        )


def compiles_blocks(config: Config, device: str) -> bool:
    """Whether blocks are compiled on a type of device.

    By default not on a CPU, where small models gain nothing and a C++ compiler may be missing, nor
    at stage 3, whose hooks inside a block break its graph.
    """
    if config.train.compile == "auto":
        return device == "cuda" and config.train.zero_stage < 3
    return config.train.compile


class Engine:
    """One rank of a training job: DeepSpeed's engine behind the few calls that the loop makes.

    Args:
        config: The run.
        device: Device of this rank, as `start_distributed` returned it.

    Attributes:
        mesh: Process groups of this rank.
        spike_detector: Decides on the device whether a step is bad.
        state: Weights and optimizer state, for checkpoints.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.mesh = Mesh.create()
        self.rank = self.mesh.rank
        self.world_size = self.mesh.world_size
        self._data_size = self.mesh.data_size
        deepspeed_api.disable_host_gradient_checks()
        settings = deepspeed_config(config, self._data_size)
        with self._construction(settings):
            module = TrainingModule(build_decoder(config), config.objective)
        if compiles_blocks(config, device.type):
            for block in [*module.model.blocks, *module.model.mtp]:
                block.compile()
        self.spike_detector = SpikeDetector(config.guard, device)
        # Of the step under way: (loss, z-loss), summed over all ranks.
        self._loss = (torch.zeros((), device=device), torch.zeros((), device=device))
        self._auxiliary_losses: dict[str, Tensor] = {}
        # DeepSpeed makes a step while it builds ZeRO-3; the spike detector does not see that.
        good = torch.zeros((), dtype=torch.bool, device=device)
        self._verdict: tuple[Tensor, Tensor] | None = (torch.zeros((), device=device), good)
        parameters = {
            name.removeprefix("model."): parameter for name, parameter in module.named_parameters()
        }
        self.optimizer_spec = optimizer_spec(config)
        self._optimizer = self.optimizer_spec.build(
            self.optimizer_spec.torch_groups(parameters.items()), self._current_verdict
        )
        self._module = module
        self._zero = None
        self._lr = config.optimizer.lr
        self._engine = deepspeed_api.initialize(module, self._optimizer, settings)
        stage = config.train.zero_stage
        self._zero = self._engine.optimizer if stage else None
        self.state = AveragedState(
            config.train.ema_decays, parameters, self._optimizer, self._zero, stage, self.mesh
        )
        self._noise = GradientNoise(module, device, self._data_size)

    @property
    def model(self) -> Decoder:
        """The model that is trained."""
        return self._module.model

    def _construction(self, settings: dict[str, Any]) -> AbstractContextManager[Any]:
        if self.config.train.zero_stage == 3:
            return deepspeed_api.partitioned_construction(settings)
        return nullcontext()

    def step(
        self, batches: list[Batch], weight_sum: Tensor, lr: float, measure: bool = False
    ) -> list[Loss]:
        """Make one optimizer step; a step that `spike_detector` finds bad changes nothing.

        Never waits for the device. Collective.

        Args:
            batches: This rank's micro-batches.
            weight_sum: Sum of token weights over all ranks and micro-batches.
            lr: Learning rate of the step; each parameter group has a multiple of it.
            measure: Whether `gradient_noise` will be asked for.

        Returns:
            The detached loss of each micro-batch.
        """
        self._noise.begin(measure)
        self._lr = lr
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self._engine.train()
        losses: list[Loss] = []
        for number, batch in enumerate(batches, 1):
            # DeepSpeed's own count is modulo a constant number of micro-batches
            self._engine.set_gradient_accumulation_boundary(number == len(batches))
            output = Loss(*self._engine(batch, weight_sum))
            # DeepSpeed averages gradients over ranks; the normalisation asks for their sum.
            self._engine.backward(output.loss * self._data_size, scale_wrt_gas=False)
            self._noise.end_micro_batch(batch.token_weights.sum(), weight_sum)
            losses.append(output._replace(loss=output.loss.detach()))
            if len(losses) == len(batches):
                self._sum_losses(losses)
            self._engine.step()
        self._check_stepped()
        _, bad = self._current_verdict()
        self.state.update_averages(bad)
        return losses

    def _sum_losses(self, losses: list[Loss]) -> None:
        """Sum the step's losses over micro-batches and ranks; its verdict is due. Collective."""
        parts = [[part.loss, part.z_loss, *part.auxiliary_losses.values()] for part in losses]
        sums = torch.stack([torch.stack([part.double() for part in of_one]) for of_one in parts])
        loss, z_loss, *auxiliary = self.all_reduce(sums.sum(dim=0))
        # Auxiliary losses are no part of the loss that is judged and logged, as the z-loss is none
        for value in auxiliary:
            loss = loss - value
        self._loss, self._verdict = (loss, z_loss), None
        self._auxiliary_losses = dict(zip(losses[0].auxiliary_losses, auxiliary, strict=True))

    def auxiliary_losses(self) -> dict[str, float]:
        """Auxiliary losses of the last step over all ranks; waits for the device."""
        return {name: float(value) for name, value in self._auxiliary_losses.items()}

    def _current_verdict(self) -> tuple[Tensor, Tensor]:
        """(Global gradient norm before clipping, whether the step is bad); see `optim.Verdict`."""
        if self._verdict is None:
            if self._zero is not None:
                norm = self._zero._global_grad_norm
            else:
                norm = nn.utils.get_total_norm(
                    [p.grad for p in self._module.parameters() if p.grad is not None]
                )
            norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device).reshape(())
            self._verdict = norm, self.spike_detector.classify(self._loss[0], self._loss[1], norm)
        return self._verdict

    def _check_stepped(self) -> None:
        """Raise RuntimeError when DeepSpeed skipped the step: the optimizer was not called."""
        skipped = self._engine.skipped_steps
        if skipped or self._verdict is None:
            overflow = getattr(self._engine.optimizer, "overflow", None)
            raise RuntimeError(
                f"DeepSpeed {deepspeed_api.VERSION} skipped an optimizer step by itself"
                f" (engine.skipped_steps = {skipped}, optimizer.overflow = {overflow}); nextpt's"
                " guard alone decides that: nextpt does not know this version"
            )

    def gradient_noise(
        self, micro_batches: int, weight_sum: Tensor, norm: float
    ) -> dict[str, float] | None:
        """Gradient noise of the last step; see `GradientNoise.estimate`. Collective.

        Args:
            micro_batches: Number of micro-batches of this rank.
            weight_sum: Of the step.
            norm: Gradient norm of the step, before clipping.
        """
        return self._noise.estimate(
            self.all_reduce, micro_batches * self._data_size, weight_sum, norm
        )

    def update_ratios(self) -> dict[str, float]:
        """|last update| / |weights| by kind of parameter; empty before the first. Collective."""
        updates = self._optimizer.scalars()["optimizer_updates"]
        squares = (
            (shard.name, self._optimizer.last_update_squares(shard, self._lr, updates))
            for shard in (self.state.own_shards() if updates else ())
        )
        return update_ratios(squares, self.all_reduce, self.device)

    @contextmanager
    def evaluating(self) -> Iterator[TrainingModule]:
        """The module in evaluation mode, without gradients.

        All ranks must call it equally often (ZeRO-3 gathers).
        """
        self._engine.eval()
        try:
            with torch.no_grad():
                yield self._module
        finally:
            self._engine.train()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that divide the data, in place. Collective."""
        dist.all_reduce(tensor, group=self.mesh.data)
        return tensor
