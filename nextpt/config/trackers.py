"""Config section `trackers`: destinations of metrics."""

from __future__ import annotations

from typing import Literal

from nextpt.config.section import Section, key


class WandbSection(Section):
    """Weights & Biases.

    The API key is read from WANDB_API_KEY or `wandb login`, never from a config.
    """

    project: str = key(
        min_length=1,
        description="project to log to; setting it switches this tracker on",
        aliases=("wandb_project",),
    )
    entity: str | None = key(
        None, description="user or team; your default one unless set", aliases=("wandb_entity",)
    )
    mode: Literal["online", "offline"] = key(
        "online",
        description="offline writes RUN/wandb for `wandb sync` later",
        aliases=("wandb_mode",),
    )


class MlflowSection(Section):
    """MLflow tracking."""

    experiment: str = key(
        min_length=1, description="experiment to log to; setting it switches this tracker on"
    )
    uri: str | None = key(
        None,
        is_path=True,
        description=(
            "tracking server or database; the file mlflow.db beside the run folder unless set"
        ),
        aliases=("tracking_uri",),
    )


class TrackersSection(Section):
    """Trackers.

    A tracker only reads events; one that fails is dropped and training goes on.
    """

    jsonl: bool = key(True, description="RUN/metrics.jsonl, which `nextpt report` reads")
    tensorboard: bool = key(
        False,
        description="RUN/tensorboard, for `tensorboard --logdir`",
        aliases=("tensorboard_dir", "use_tensorboard"),
    )
    wandb: WandbSection | None = key(
        None, description="Weights & Biases", aliases=("use_wandb", "wandb_log")
    )
    mlflow: MlflowSection | None = key(None, description="MLflow")
