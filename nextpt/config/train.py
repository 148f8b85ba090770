"""Config section `train`: length, batch, precision and memory of training."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from nextpt.config.section import Section, key

LossGradient = Literal["precise", "small"]


class BatchChangeSection(Section):
    """A change of the batch size at a step, or at the first step after that many tokens."""

    after_steps: int | None = key(
        None, ge=1, unit="optimizer steps", description="completed steps at which it changes"
    )
    after_tokens: int | None = key(
        None,
        ge=1,
        unit="tokens",
        description="consumed tokens at which it changes, rounded up to whole steps",
    )
    global_batch_size: int = key(
        ge=1, unit="sequences", description="sequences per optimizer step from there on"
    )


class BatchGrowthSection(Section):
    """A batch that doubles as the gradient noise scale grows; see nextpt/train/batch_growth.py."""

    max_batch_size: int = key(
        ge=1, unit="sequences", description="the batch doubles while it stays within this"
    )
    noise_ratio: float = key(
        1.0, gt=0, unit="batches", description="it doubles where the noise scale is above this"
    )
    measured_steps: int = key(
        100,
        ge=2,
        unit="logged steps",
        description="estimates that are averaged for one comparison; two in a row must be above",
    )


class DecayFromSection(Section):
    """The checkpoint at which a decay begins; see nextpt/train/decay_start.py."""

    run: str = key(is_path=True, description="run folder of the stable run")
    at_step: int = key(ge=1, unit="optimizer steps", description="step of its checkpoint")


class TrainSection(Section):
    """Length of the run, batch size, and how it is computed."""

    steps: int | None = key(
        None,
        ge=1,
        unit="optimizer steps",
        may_change=True,
        description="length of the run; set this, train.tokens or train.epochs",
        aliases=(
            "max_steps",
            "total_steps",
            "train_steps",
            "max_iters",
            "train_iters",
            "num_steps",
            "num_iterations",
            "num_train_steps",
        ),
    )
    tokens: int | None = key(
        None,
        ge=1,
        unit="tokens",
        may_change=True,
        description="tokens to train on, rounded up to whole steps",
        aliases=("max_tokens", "total_tokens", "train_tokens", "num_tokens", "token_budget"),
    )
    epochs: float | None = key(
        None,
        gt=0,
        unit="epochs",
        may_change=True,
        description="passes over all training sequences of the dataset, rounded up to whole steps",
        aliases=("num_epochs", "num_train_epochs", "max_epochs", "n_epochs"),
    )
    epoch_sequences: int | None = key(
        None,
        ge=1,
        unit="sequences",
        may_change=True,
        description="training sequences of the dataset, for train.epochs; counted unless set",
    )
    decay_from: DecayFromSection | None = key(
        None,
        description=(
            "start at a checkpoint of a long stable run and decay over schedule.decay, which sets"
            " the length of this run"
        ),
    )
    stop_at: int | None = key(
        None,
        ge=1,
        unit="optimizer steps",
        may_change=True,
        description="step after which to end early; the schedule still runs to train.steps",
        aliases=("stop_step", "exit_interval", "stop_after"),
    )
    global_batch_size: int = key(
        ge=1,
        unit="sequences",
        description="sequences per optimizer step, over all ranks",
        aliases=("batch_size", "train_batch_size", "total_batch_size", "gbs", "device_batch_size"),
    )
    batch_schedule: list[BatchChangeSection] | None = key(
        None,
        may_change=True,
        description=(
            "changes of the batch size, each {after_steps or after_tokens, global_batch_size};"
            " later ones may be added to a run that has begun"
        ),
        aliases=("batch_ramp", "rampup_batch_size", "batch_size_schedule", "batch_warmup"),
    )
    batch_growth: BatchGrowthSection | None = key(
        None,
        may_change=True,
        description="double the batch as the measured gradient noise grows, at checkpoints",
    )
    micro_batch_size: int = key(
        ge=1,
        unit="sequences",
        may_change=True,
        description="sequences per forward pass of one rank",
        aliases=(
            "batch_size",
            "local_batch_size",
            "device_batch_size",
            "per_device_train_batch_size",
            "train_micro_batch_size_per_gpu",
            "microbatch_size",
            "mbs",
        ),
    )
    ema: list[float] | float | None = key(
        None,
        may_change=True,
        description="decay, or decays, of exponential moving averages of the weights to keep",
        aliases=("ema_decay", "ema_beta", "use_ema", "weight_averaging"),
    )
    init_from: str | None = key(
        None,
        is_path=True,
        description="Hugging Face folder with the initial weights; random weights unless set",
        aliases=("model_name_or_path", "pretrained", "init_weights", "load_path"),
    )
    zero_stage: Literal[0, 1, 2, 3] = key(
        1,
        may_change=True,
        description="ZeRO stage: 1 divides the optimizer state, 2 gradients, 3 weights too",
        aliases=("zero", "zero_optimization", "zero_level"),
    )
    hpz_ranks: int | None = key(
        None,
        ge=2,
        unit="ranks",
        may_change=True,
        description=(
            "ZeRO-3: ranks of one node that keep a second copy of the weights, divided among them,"
            " so that the backward pass gathers inside the node (ZeRO++, arXiv 2306.10209)"
        ),
        aliases=("zero_hpz_partition_size",),
    )
    precision: Literal["fp32", "bf16"] = key(
        "bf16",
        may_change=True,
        description="bf16 keeps fp32 master weights",
        aliases=("dtype", "torch_dtype", "mixed_precision", "fp16", "amp"),
    )
    activation_checkpointing: bool = key(
        False,
        may_change=True,
        description="recompute each block in the backward pass",
        aliases=("gradient_checkpointing", "recompute", "recompute_granularity"),
    )
    compile: bool | Literal["auto"] = key(
        "auto",
        may_change=True,
        description="torch.compile each block; auto: on CUDA at stages 0 to 2",
        aliases=("torch_compile", "use_compile"),
    )
    loss_gradient: LossGradient = key(
        "precise",
        may_change=True,
        description=(
            "bf16 gradient of the output matrix: one chunk or fp32 sums (precise), or 8 and more"
            " chunks with fp16 sums, for less memory (small)"
        ),
    )
    loss_logits_fp32: bool = key(
        False,
        may_change=True,
        description=(
            "bf16 on a GPU: fp32 logits, for twice the workspace; a CPU always has fp32 logits"
        ),
    )
    loss_workspace_mib: int | None = key(
        None,
        ge=1,
        unit="MiB",
        may_change=True,
        description="memory of the loss beside its gradients; 2048 (GPU) or 256 (CPU) unless set",
    )
    log_every: int = key(
        10,
        ge=1,
        unit="optimizer steps",
        may_change=True,
        description="interval between metrics; only these steps synchronise with the host",
        aliases=("log_interval", "logging_steps", "log_freq", "log_every_n_steps", "log_steps"),
    )
    hang_seconds: float = key(
        60.0,
        ge=1,
        unit="seconds",
        may_change=True,
        description=(
            "time without progress after which a job ends as hung, or ten times what the work"
            " usually takes if that is longer"
        ),
        aliases=("timeout", "nccl_timeout", "ddp_timeout", "timeout_minutes"),
    )
    peak_tflops: float | None = key(
        None,
        gt=0,
        unit="TFLOP/s",
        may_change=True,
        description="dense peak of one device, for MFU; known for common GPUs",
        aliases=("peak_flops", "device_flops", "hardware_peak_flops"),
    )

    @property
    def ema_decays(self) -> list[float]:
        """Decays of the averages of the weights, in rising order."""
        if self.ema is None:
            return []
        return sorted(self.ema if isinstance(self.ema, list) else [self.ema])

    @model_validator(mode="after")
    def _check_ema(self) -> TrainSection:
        for decay in self.ema_decays:
            if not 0 < decay < 1:
                raise ValueError(f"train.ema = {decay}: a decay is above 0 and below 1")
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"train.ema = {self.ema_decays} has a decay twice; remove one")
        return self
