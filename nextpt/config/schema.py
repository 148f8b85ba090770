"""Config: the whole description of a run, checks across sections, and derived quantities."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from nextpt.base.errors import ConfigError
from nextpt.config.batches import BatchSchedule
from nextpt.config.checkpoint import CheckpointSection
from nextpt.config.data import DataSection
from nextpt.config.guard import GuardSection
from nextpt.config.model import ModelSection
from nextpt.config.objective import ObjectiveSection
from nextpt.config.optimizer import AdamWGroup, OptimizerSection, ScheduleSection
from nextpt.config.run import RunSection
from nextpt.config.section import Section, key
from nextpt.config.trackers import TrackersSection
from nextpt.config.train import TrainSection
from nextpt.config.validation import ValidationSection


class Config(Section):
    """Complete description of one run."""

    run: RunSection = key(description="identity of the run")
    data: DataSection = key(
        description="dataset and order of reading", aliases=("dataset", "dataloader", "dataloading")
    )
    model: ModelSection = key(description="shape of the decoder", aliases=("transformer",))
    objective: ObjectiveSection = key(
        ObjectiveSection(), description="weighted next-token loss", aliases=("loss",)
    )
    optimizer: OptimizerSection = key(description="optimizer", aliases=("optim",))
    schedule: ScheduleSection = key(
        ScheduleSection(),
        description="learning-rate schedule",
        aliases=("scheduler", "lr_scheduler"),
    )
    train: TrainSection = key(
        description="length, batch and precision", aliases=("training", "trainer")
    )
    # No key of these sections changes what the model learns from which data.
    checkpoint: CheckpointSection = key(
        CheckpointSection(),
        may_change=True,
        description="saving and resuming",
        aliases=("checkpointer", "checkpointing", "checkpoints"),
    )
    guard: GuardSection = key(GuardSection(), may_change=True, description="detection of bad steps")
    validation: ValidationSection = key(
        ValidationSection(),
        may_change=True,
        description="loss on the validation split",
        aliases=("eval", "evaluation", "val"),
    )
    trackers: TrackersSection = key(
        TrackersSection(),
        may_change=True,
        description="destinations of metrics",
        aliases=("logging", "loggers", "metrics"),
    )

    @property
    def run_dir(self) -> Path:
        """Run folder."""
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.run.name

    @property
    def batches(self) -> BatchSchedule:
        """Batch size by step, and what any number of steps consumes."""
        return BatchSchedule(self.data.sequence_length, ((0, self.train.global_batch_size),))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run as planned."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return self.batches.steps_for_tokens(self.train.tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens of the run as planned; train.tokens is rounded up to whole steps."""
        return self.batches.consumed_tokens(self.total_steps)

    @property
    def last_step(self) -> int:
        """Step after which training ends: the last one, or train.stop_at."""
        return min(self.total_steps, self.train.stop_at or self.total_steps)

    @property
    def max_position(self) -> int:
        """Largest position of the model, tokens."""
        return self.model.max_position or self.data.sequence_length

    def accumulation_steps(self, world_size: int, step: int = 0) -> int:
        """Micro-batches per rank of the optimizer step after `step` completed steps.

        Raises:
            ConfigError: A batch of the run cannot be divided among `world_size` ranks.
        """
        train = self.train
        if train.hpz_ranks and world_size % train.hpz_ranks:
            raise ConfigError(
                f"train.hpz_ranks = {train.hpz_ranks} does not divide the {world_size} ranks; set"
                " it to the ranks of one node, and start as many on each"
            )
        per_pass = train.micro_batch_size * world_size
        if train.global_batch_size % per_pass:
            raise ConfigError(
                f"train.global_batch_size = {train.global_batch_size} is not a multiple of"
                f" train.micro_batch_size x ranks = {train.micro_batch_size} x {world_size} ="
                f" {per_pass}; change one of them or the number of ranks"
            )
        return self.batches.batch_size(step) // per_pass

    @model_validator(mode="after")
    def _check_train(self) -> Config:
        train = self.train
        if (train.steps is None) == (train.tokens is None):
            raise ValueError("give exactly one of train.steps and train.tokens")
        if train.zero_stage == 0 and train.precision == "bf16":
            raise ValueError(
                "train.zero_stage = 0 with train.precision = bf16 is another optimizer in"
                " DeepSpeed; use train.zero_stage=1, which is the same training with the state"
                " divided"
            )
        if train.hpz_ranks and train.zero_stage != 3:
            raise ValueError(
                f"train.hpz_ranks = {train.hpz_ranks} is for train.zero_stage = 3, which divides"
                f" the weights; leave it out with train.zero_stage = {train.zero_stage}"
            )
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size = {train.global_batch_size} is not a multiple of"
                f" train.micro_batch_size = {train.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Config:
        if self.model.tied_embeddings and self.optimizer.output != AdamWGroup():
            raise ValueError(
                "optimizer.output is for an output matrix of its own; with"
                " model.tied_embeddings = true set optimizer.embedding"
            )
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Config:
        if self.data.sequence_length > self.max_position:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length} is above model.max_position"
                f" = {self.max_position}; raise the latter or shorten the sequences"
            )
        stages = self.data.stages
        if stages and stages[-1].steps is not None:
            steps = sum(stage.steps or 0 for stage in stages)
            if steps < self.total_steps:
                raise ValueError(
                    f"data.stages end after {steps} steps and the run has {self.total_steps};"
                    " leave out the steps of the last stage, or add one"
                )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Config:
        schedule = self.schedule
        total = self.total_tokens if schedule.unit == "tokens" else self.total_steps
        if schedule.warmup > total:
            raise ValueError(
                f"schedule.warmup = {schedule.warmup} {schedule.unit} is longer than the run:"
                f" {total}"
            )
        if schedule.kind != "wsd" and schedule.decay is not None:
            raise ValueError("schedule.decay is for schedule.kind = wsd only")
        if schedule.kind == "wsd" and schedule.warmup + (schedule.decay or 0) > total:
            raise ValueError(
                f"schedule.warmup + schedule.decay = {schedule.warmup + (schedule.decay or 0)}"
                f" {schedule.unit} is longer than the run: {total}"
            )
        return self
