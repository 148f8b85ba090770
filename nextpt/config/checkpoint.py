"""Config section `checkpoint`: when state is saved, what is kept, and what a start resumes from."""

from __future__ import annotations

from typing import Literal

from nextpt.config.section import Section, key


class CheckpointSection(Section):
    """Saving and resuming. A checkpoint is also written at the end of the run."""

    every_steps: int | None = key(
        None,
        ge=1,
        unit="optimizer steps",
        description="interval between checkpoints",
        aliases=(
            "save_interval",
            "save_steps",
            "save_every",
            "checkpoint_interval",
            "ckpt_interval",
            "save_freq",
            "ckpt_freq",
        ),
    )
    every_minutes: float | None = key(
        None, gt=0, unit="minutes", description="longest time between checkpoints"
    )
    resume: Literal["auto", "never"] | int = key(
        "auto",
        description=(
            "auto: newest complete checkpoint; a step: that one, an error if it is missing; never:"
            " an error if there is any"
        ),
        aliases=("resume_from_checkpoint", "load", "load_checkpoint", "resume_from"),
    )
    grace_seconds: float = key(
        30.0,
        gt=0,
        unit="seconds",
        description=(
            "time from SIGTERM or SIGUSR1 to the kill (Slurm's KillWait is 30): a save that takes"
            " longer is not begun"
        ),
        aliases=("kill_wait", "preemption_grace"),
    )
    accept_changed_data: bool = key(
        False, description="resume although the dataset or its order has changed"
    )
    asynchronous: bool = key(
        False,
        description=(
            "write a copy of the state while training continues; costs each rank the memory of its"
            " share, and a kill may lose twice the steps between saves"
        ),
        aliases=("async_save", "async_checkpoint", "async", "async_mode"),
    )
    on_failure: Literal["stop", "continue"] = key(
        "continue",
        description="after a failed save: end with the error, or train on until the next save",
    )
    max_failures: int = key(
        3,
        ge=1,
        unit="saves",
        description="consecutive failed saves that end training with on_failure: continue",
    )
    mirror: str | None = key(
        None,
        is_path=True,
        description=(
            "s3://BUCKET/RUN, another URI that fsspec reads, or a folder: checkpoints are copied"
            " to it and restored from it when the run folder is lost; one URI per run"
        ),
        aliases=("remote_save_folder", "upload_to", "remote"),
    )
    keep_last: int | None = key(
        3,
        ge=2,
        unit="checkpoints",
        description="newest checkpoints to keep; older ones are removed after a save; null: all",
        aliases=(
            "save_total_limit",
            "keep_latest_k",
            "save_num_checkpoints_to_keep",
            "keep_checkpoints",
        ),
    )
    keep_every: int | None = key(
        None,
        ge=1,
        unit="optimizer steps",
        description="checkpoints of multiples of this step are never removed",
        aliases=("keep_interval", "keep_period"),
    )
    keep_best: int | None = key(
        None,
        ge=1,
        unit="checkpoints",
        description="checkpoints with the lowest validation loss (total, nats per token) to keep",
        aliases=("save_top_k", "load_best_model_at_end"),
    )
