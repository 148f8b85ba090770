"""DeepSpeed, and nothing of it anywhere else: its start, its configuration, the step, and its state as fragments.

Differences from DeepSpeed's defaults, each on purpose:
- its JIT-built shared-memory collective is switched off on CPU: a process killed while it builds
  leaves a lock on which every later run hangs; gloo alone gives the same losses and needs no
  compiler;
- clipping and the guard against bad steps run in our optimizer, on the device (see nextpt/optim,
  guard.py); DeepSpeed's own checks read the norm on the host in every step and skip steps without a
  word; a skip of its own is an error here;
- its checkpoints are not used (see nextpt/checkpoint).
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

# Before deepspeed is imported: it reads this then.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, message=".*(reduce_scatter|all_gather).*")

import deepspeed  # noqa: E402
import psutil  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from nextpt.base.errors import UserError  # noqa: E402
from nextpt.checkpoint.state import Fragment, FragmentReader  # noqa: E402
from nextpt.config import Config  # noqa: E402
from nextpt.data.batch import Batch  # noqa: E402
from nextpt.model import Decoder, build_decoder  # noqa: E402
from nextpt.objective import Loss, next_token_loss  # noqa: E402
from nextpt.optim.adamw import GuardedAdamW, decays, parameter_groups  # noqa: E402
from nextpt.train.dynamics import AdamWUpdates, GradientNoise, update_ratios  # noqa: E402
from nextpt.train.memory import LIVE_PARAMETERS, reduce_bucket  # noqa: E402
from nextpt.train.spike_detector import SpikeDetector  # noqa: E402

# It warns of what is meant to be: a CPU, an optimizer of ours
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
MOMENTS = ("exp_avg", "exp_avg_sq")


def start_distributed(timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group; returns this rank's device.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the launcher; a process
    started alone becomes rank 0 of 1 on a free port.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if not cuda and "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1")))
        )
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    if interface := _interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            verbose=False,
        )
    except (RuntimeError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"ranks cannot meet at {address}: {_first_line(error)}; another job may use the port:"
            " give --master_port to deepspeed, or set MASTER_PORT"
        ) from error
    if cuda:
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def deepspeed_config(config: Config, world_size: int) -> dict:
    """The whole DeepSpeed configuration, derived here and nowhere else; no default is relied on."""
    bf16 = config.train.precision == "bf16"
    stage = config.train.zero_stage
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": True,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "memory_efficient_linear": False,
            "reduce_bucket_size": reduce_bucket(config),
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_max_reuse_distance": LIVE_PARAMETERS,
            "zero_hpz_partition_size": config.train.hpz_ranks or 1,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _never_invalid(norm: object) -> bool:
    """Stands in for DeepSpeed's host-side check.

    GuardedAdamW makes the same decision on the device.
    """
    return False


def _stop_host_checks() -> None:
    """DeepSpeed reads the gradient norm on the host in every step to look for infinities.

    Ours is on the device.
    """
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, stage3, stage_1_and_2):
        assert hasattr(module, "is_invalid_grad_norm"), (
            f"{module.__name__} changed; see deepspeed's version bounds"
        )
        module.is_invalid_grad_norm = _never_invalid


class TrainingModule(nn.Module):
    """What the engine wraps: a model whose forward returns the loss."""

    def __init__(self, model: Decoder, z_loss_coefficient: float) -> None:
        super().__init__()
        self.model, self.z_loss_coefficient = model, z_loss_coefficient

    def forward(self, batch: Batch, weight_sum: Tensor) -> Loss:
        return next_token_loss(self.model, batch, weight_sum, self.z_loss_coefficient)


class Engine:
    """One rank of a training job: DeepSpeed's engine behind the few calls that the loop makes.

    It is also the `ShardedState` that checkpoints read and write.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        _stop_host_checks()
        settings = deepspeed_config(config, self.world_size)
        with self._construction(settings):
            module = TrainingModule(build_decoder(config), config.objective.z_loss_coefficient)
        if config.train.compile:
            for block in module.model.blocks:
                block.compile()
        self.spike_detector = SpikeDetector(config.guard, device)
        # Of the step under way: (total, z part), over all ranks
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)
        # ZeRO-3 makes a step when it is built, which is not judged.
        good = torch.zeros((), dtype=torch.bool, device=device)
        self._verdict: tuple[Tensor, Tensor] | None = (torch.zeros((), device=device), good)
        self._optimizer = GuardedAdamW(
            parameter_groups(module, config.optimizer), config.optimizer, self._verdict_now
        )
        self._module, self._zero = module, None
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=settings
        )
        self._zero = self._engine.optimizer if config.train.zero_stage else None
        self._names = {
            parameter: name.removeprefix("model.") for name, parameter in module.named_parameters()
        }
        self._create_moments()
        self._noise = GradientNoise(module, device, self.world_size)

    @property
    def model(self) -> Decoder:
        return self._module.model

    def _construction(self, settings: dict):
        """ZeRO-3 divides each layer as soon as it is built, so that models larger than one device can be built."""
        return (
            deepspeed.zero.Init(config_dict_or_path=settings)
            if self.config.train.zero_stage == 3
            else nullcontext()
        )

    # ---- the step
    #   -------------------------------------------------------------------------------------------

    def step(
        self, batches: list[Batch], weight_sum: Tensor, lr: float, measure: bool = False
    ) -> list[Loss]:
        """One optimizer step over this rank's micro-batches, which changes nothing when `judge` finds it bad. No host synchronisation.

        weight_sum: sum of token weights over all ranks and micro-batches. DeepSpeed averages
        gradients over ranks; multiplying by their number makes that the sum which the normalisation
        asks for. measure: for `gradient_noise`.
        """
        self._noise.begin(measure)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.train()
        losses = []
        for batch in batches:
            loss = Loss(*self._engine(batch, weight_sum))
            self._engine.backward(loss.total * self.world_size, scale_wrt_gas=False)
            self._noise.end_micro_batch(batch.token_weights.sum(), weight_sum)
            losses.append(Loss(loss.total.detach(), loss.z_loss, loss.nats))
            if len(losses) == len(batches):
                parts = torch.stack(
                    [torch.stack([one.total.double(), one.z_loss.double()]) for one in losses]
                )
                self._loss, self._verdict = self.all_sum(parts.sum(dim=0)), None
            self._engine.step()
        self._check_stepped()
        return losses

    def _verdict_now(self) -> tuple[Tensor, Tensor]:
        """(global gradient norm before clipping, whether the step is bad) of the step under way.

        Called by the optimizer.
        """
        if self._verdict is None:
            if self._zero is not None:
                norm = self._zero._global_grad_norm
            else:
                norm = torch.nn.utils.get_total_norm(
                    [p.grad for p in self._module.parameters() if p.grad is not None]
                )
            norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device).reshape(())
            self._verdict = norm, self.spike_detector.classify(*self._loss, norm)
        return self._verdict

    def gradient_noise(
        self, micro_batches: int, weight_sum: Tensor, norm: float
    ) -> dict[str, float] | None:
        """Of the step just made (train/dynamics.py), where that was measured. micro_batches: of this rank. Collective."""
        return self._noise.estimate(self.all_sum, micro_batches * self.world_size, weight_sum, norm)

    def update_ratios(self) -> dict[str, float]:
        """|last update| / |weights| by kind of parameter (train/dynamics.py). Collective."""
        section = self.config.optimizer
        shares = (
            (name, section.weight_decay * decays(name, shape, section), tensors)
            for name, shape, _, tensors in self._shares()
        )
        updates = AdamWUpdates(
            self._optimizer.param_groups[0]["lr"],
            section.betas,
            section.eps,
            self.scalars()["optimizer_updates"],
        )
        return update_ratios(shares, updates, self.all_sum, self.device)

    def _check_stepped(self) -> None:
        """Raise RuntimeError when DeepSpeed passed over the step by itself, in whatever way: the optimizer was not asked to step."""
        skipped = self._engine.skipped_steps
        if skipped or self._verdict is None:
            overflow = getattr(self._engine.optimizer, "overflow", None)
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__} skipped an optimizer step by itself"
                f" (engine.skipped_steps = {skipped}, optimizer.overflow = {overflow}); nextpt's"
                " guard alone decides that: nextpt does not know this version"
            )

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

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; collective."""
        dist.all_reduce(tensor)
        return tensor

    # ---- ShardedState
    #   ---------------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the fp32 weights and moments, as flat ranges of named parameters.

        No gathering.
        """
        for name, shape, start, tensors in self._shares():
            for kind, tensor in tensors.items():
                yield Fragment(
                    name=name,
                    kind=kind,
                    shape=shape,
                    start=start,
                    stop=start + tensor.numel(),
                    tensor=tensor,
                )

    def scalars(self) -> dict[str, float]:
        """Number of updates the optimizer has made."""
        return {
            "optimizer_updates": float(
                max((float(s["step"]) for s in self._optimizer.state.values()), default=0.0)
            )
        }

    def load(self, reader: FragmentReader, scalars: dict[str, float]) -> None:
        """Read this rank's ranges into place, then bring the working weights in line with the master weights."""
        with torch.no_grad():
            for name, _, start, tensors in self._shares(whole=True):
                for kind, tensor in tensors.items():
                    tensor.copy_(reader.read(name, kind, start, start + tensor.numel()))
            for state in self._optimizer.state.values():
                state["step"].fill_(scalars["optimizer_updates"])
        if self.config.train.zero_stage == 3:
            # hpZ's copies, which a validation may have made of other weights
            self._zero.invalidate_secondary_tensor()
            for group in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
        elif self._zero is not None:
            self._zero.update_lp_params()

    def state_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Full shape of every kind of value of every parameter. A tied matrix appears once."""
        return {
            name: dict.fromkeys(("weight", *MOMENTS), tuple(getattr(p, "ds_shape", p.shape)))
            for p, name in self._names.items()
        }

    def _shares(
        self, whole: bool = False
    ) -> Iterator[tuple[str, tuple[int, ...], int, dict[str, Tensor]]]:
        """(name, full shape, first flat element, {kind: 1-D fp32 view}) of each parameter this rank holds a part of.

        whole: at stage 0, where every rank holds everything, all of it (to load) and not an equal
        share (to save).
        """
        shapes = {name: kinds["weight"] for name, kinds in self.state_shapes().items()}
        for parameter, name in self._names.items():
            stage = self.config.train.zero_stage
            place = {0: self._place_0, 1: self._place_1_2, 2: self._place_1_2, 3: self._place_3}[
                stage
            ](parameter)
            if place is None:
                continue
            flat, offset, start, length = place
            if stage == 0 and not whole:
                share = -(-length // self.world_size)
                start = min(self.rank * share, length)
                offset, length = start, min(share, length - start)
            if length > 0:
                kinds = {"weight": flat} | {
                    kind: self._optimizer.state[flat][kind] for kind in MOMENTS
                }
                views = {
                    kind: t.detach().view(-1)[offset : offset + length] for kind, t in kinds.items()
                }
                yield name, shapes[name], start, views

    # Each returns (flat fp32 tensor that the optimizer steps, offset in it, first flat element of
    # the parameter, length).

    def _place_0(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        return parameter, 0, 0, parameter.numel()

    def _place_1_2(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        link = parameter._hp_mapping
        if link is None:
            return None
        flat = self._flat_partitions()[link.param_group_index]
        return (
            flat,
            link.hp_fragment_address.start,
            link.lp_fragment_address.start,
            link.lp_fragment_address.numel,
        )

    def _place_3(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int] | None:
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        share = parameter.ds_tensor.ds_numel
        start = self.rank * share
        length = min(share, parameter.ds_numel - start)  # the last ranks' shares are padded
        return (self._flat_partitions()[group], offset, start, length) if length > 0 else None

    def _flat_partitions(self) -> list[Tensor]:
        """The flat fp32 tensors of this rank, one per group, that the optimizer steps."""
        for attribute in (
            "fp32_partitioned_groups_flat",
            "fp32_groups_flat_partition",
            "single_partition_of_fp32_groups",
        ):
            if hasattr(self._zero, attribute):
                return getattr(self._zero, attribute)
        raise AssertionError(
            f"{type(self._zero).__name__} holds no known fp32 partitions; see deepspeed's version"
            " bounds"
        )

    def _create_moments(self) -> None:
        """Zero moments before the first step, so that saving and loading see the same state at any time.

        ZeRO-3 creates them by a step on zero gradients, which counts as an update: the count is set
        back.
        """
        for group in self._optimizer.param_groups:
            for parameter in group["params"] if self._zero is None else ():
                self._blank_state(parameter)
        for flat in self._flat_partitions() if self._zero is not None else ():
            self._blank_state(flat)

    def _blank_state(self, tensor: Tensor) -> None:
        state = self._optimizer.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        state["step"].zero_()


def _interface_to(address: str) -> str | None:
    """The network interface by which this host reaches the first rank.

    None where that cannot be told.

    Left alone gloo takes the one that the host's own name resolves to, which often is the loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 1))  # sends nothing, on no port: it only asks the routing table
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next(
        (
            name
            for name, found in psutil.net_if_addrs().items()
            if any(a.address == own for a in found)
        ),
        None,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
