"""Config: the whole description of a run, checks across sections, and derived quantities."""

from __future__ import annotations

import math
from fractions import Fraction
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
        """Batch size by step, and what any number of steps consumes, as planned."""
        batches = BatchSchedule(self.data.sequence_length, ((0, self.train.global_batch_size),))
        for change in self.train.batch_schedule or ():
            step = change.after_steps
            if step is None:
                step = batches.steps_for_tokens(change.after_tokens or 0)
            batches = batches.with_change(step, change.global_batch_size)
        return batches

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run as planned.

        Raises:
            ConfigError: With train.epochs, before the sequences of the dataset were counted.
        """
        return self.total_steps_with(self.batches)

    @property
    def total_tokens(self) -> int:
        """Tokens of the run as planned; train.tokens is rounded up to whole steps."""
        return self.batches.consumed_tokens(self.total_steps)

    def total_steps_with(self, batches: BatchSchedule) -> int:
        """As `total_steps`, with batch sizes that were decided during the run."""
        train = self.train
        if train.decay_from is not None:
            start, decay = train.decay_from.at_step, self.schedule.decay or 0
            if self.schedule.unit == "steps":
                return start + decay
            return batches.steps_for_tokens(batches.consumed_tokens(start) + decay)
        if train.steps is not None:
            return train.steps
        if train.tokens is not None:
            return batches.steps_for_tokens(train.tokens)
        if train.epoch_sequences is None:
            raise ConfigError(
                f"train.epochs = {train.epochs} needs the number of training sequences of"
                f" {self.data.path}, which nothing has counted; set train.epoch_sequences"
            )
        # As it is written: 0.7 is not the binary number next to it
        return batches.steps_for(math.ceil(Fraction(str(train.epochs)) * train.epoch_sequences))

    @property
    def _has_length(self) -> bool:
        """Whether the number of steps follows from the config alone."""
        return self.train.epochs is None or self.train.epoch_sequences is not None

    @property
    def last_step(self) -> int:
        """Step after which training ends: the last one, or train.stop_at."""
        return self.last_step_with(self.batches)

    def last_step_with(self, batches: BatchSchedule) -> int:
        """As `last_step`, with batch sizes that were decided during the run."""
        total = self.total_steps_with(batches)
        return min(total, self.train.stop_at or total)

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
        if wrong := self._batches_not_divided_by(per_pass):
            raise ConfigError(
                f"{wrong} of train.micro_batch_size x ranks = {train.micro_batch_size} x"
                f" {world_size} = {per_pass}; change one of them or the number of ranks"
            )
        return self.batches.batch_size(step) // per_pass

    def _batches_not_divided_by(self, divisor: int) -> str | None:
        """Batch sizes that `divisor` does not divide, as the subject of an error; None: all are."""
        train = self.train
        sizes = {"train.global_batch_size": train.global_batch_size}
        for number, change in enumerate(train.batch_schedule or ()):
            sizes[f"train.batch_schedule.{number}.global_batch_size"] = change.global_batch_size
        wrong = [f"{key} = {size}" for key, size in sizes.items() if size % divisor]
        if not wrong:
            return None
        verb = "is not a multiple" if len(wrong) == 1 else "are no multiples"
        return f"{', '.join(wrong)} {verb}"

    @model_validator(mode="after")
    def _check_train(self) -> Config:
        train = self.train
        self._check_length_keys()
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
        if wrong := self._batches_not_divided_by(train.micro_batch_size):
            raise ValueError(f"{wrong} of train.micro_batch_size = {train.micro_batch_size}")
        return self

    @model_validator(mode="after")
    def _check_batch_schedule(self) -> Config:
        changes = self.train.batch_schedule or ()
        for number, change in enumerate(changes):
            name = f"train.batch_schedule.{number}"
            if (change.after_steps is None) == (change.after_tokens is None):
                raise ValueError(f"give exactly one of {name}.after_steps and {name}.after_tokens")
        # A change at or before the step of another one removes that one
        if len(self.batches.changes) != len(changes) + 1:
            raise ValueError(
                "train.batch_schedule is not in rising order: each change must be at a later step"
                f" than the one before it; {len(self.batches.changes) - 1} of {len(changes)} are"
            )
        return self

    @model_validator(mode="after")
    def _check_batch_growth(self) -> Config:
        growth, train = self.train.batch_growth, self.train
        if growth is None:
            return self
        if train.batch_schedule:
            raise ValueError("give either train.batch_schedule or train.batch_growth")
        if self.checkpoint.every_steps is None:
            raise ValueError(
                "train.batch_growth decides at checkpoints, so that a resumed run decides alike;"
                " set checkpoint.every_steps"
            )
        if self.data.stages and len(self.data.stages) > 1:
            raise ValueError(
                "data.stages are counted in steps, and train.batch_growth changes their size in"
                " the run; leave one of them out"
            )
        length = "steps" if train.steps is not None else "tokens"
        if train.decay_from is None and self.schedule.unit != length:
            raise ValueError(
                f"schedule.unit = {self.schedule.unit}, but with train.batch_growth the length of"
                f" the run is fixed in {length} only; set schedule.unit={length}"
            )
        return self

    def _check_length_keys(self) -> None:
        """Raise ValueError unless exactly one key sets the length of the run."""
        train = self.train
        lengths = [key for key in ("steps", "tokens", "epochs") if getattr(train, key) is not None]
        if train.decay_from is not None:
            if lengths:
                raise ValueError(
                    f"train.{lengths[0]} is given with train.decay_from, whose run ends"
                    f" schedule.decay after its step; set train.{lengths[0]}=null"
                )
            if not self.schedule.has_final_decay or self.schedule.decay is None:
                raise ValueError(
                    f"train.decay_from needs schedule.decay and schedule.kind = wsd or power; they"
                    f" are {self.schedule.decay} and {self.schedule.kind}"
                )
        elif len(lengths) != 1:
            keys = ", ".join(f"train.{key}" for key in lengths) or "none"
            raise ValueError(
                f"give exactly one of train.steps, train.tokens and train.epochs; given: {keys}"
            )
        if train.epochs is not None and (
            self.data.mixing or any(stage.mixing for stage in self.data.stages or ())
        ):
            raise ValueError(
                "train.epochs counts passes over the whole dataset, and with data.mixing every"
                " domain has its own number of them; give train.steps or train.tokens"
            )

    @model_validator(mode="after")
    def _check_validation(self) -> Config:
        if self.validation.averages and not self.train.ema_decays:
            raise ValueError(
                "validation.averages = true, but the run keeps no averages of its weights; set"
                " their decays in train.ema, or validation.averages=false"
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
        if self.model.mtp_depth >= self.data.sequence_length - 1:
            raise ValueError(
                f"model.mtp_depth = {self.model.mtp_depth} predicts further ahead than"
                f" data.sequence_length = {self.data.sequence_length} reaches; use at most"
                f" {self.data.sequence_length - 2}"
            )
        stages = self.data.stages
        if stages and stages[-1].steps is not None and self._has_length:
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
        if not self._has_length:
            return self
        total = self.total_tokens if schedule.unit == "tokens" else self.total_steps
        if schedule.warmup > total:
            raise ValueError(
                f"schedule.warmup = {schedule.warmup} {schedule.unit} is longer than the run:"
                f" {total}"
            )
        if schedule.warmup + (schedule.decay or 0) > total:
            raise ValueError(
                f"schedule.warmup + schedule.decay = {schedule.warmup + (schedule.decay or 0)}"
                f" {schedule.unit} is longer than the run: {total}"
            )
        return self
