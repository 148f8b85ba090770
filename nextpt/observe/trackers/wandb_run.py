"""Weights & Biases, online or offline."""

from __future__ import annotations

import os
import secrets
from netrc import NetrcParseError, netrc
from urllib.parse import urlsplit

import wandb

from nextpt.base.errors import ConfigError
from nextpt.base.files import atomic_write
from nextpt.config import Config
from nextpt.events import Event, scalars


class WandbTracker:
    """One W&B run per run folder; RUN/wandb_id has its id, with which a resumed run continues.

    The step is logged as a value and used as the axis: W&B's own step cannot go back, and a resumed
    run repeats some steps. Only the config and the metrics leave the machine: no code,
    no git state, no console output.
    """

    def __init__(self, config: Config) -> None:
        section = config.trackers.wandb
        assert section is not None  # selected by the config
        if section.mode == "online" and not _has_key():
            raise ConfigError(
                "trackers.wandb: no API key; set WANDB_API_KEY or run `wandb login`, "
                "or choose trackers.wandb.mode=offline"
            )
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
        )
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            dir=config.run_dir,
            name=config.run.name,
            id=_id(config),
            resume="allow",
            config=config.model_dump(mode="json"),
            settings=quiet,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_event(self, event: Event) -> None:
        """Log the scalars of an event."""
        self._run.log({"step": event.step} | scalars(event))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _has_key() -> bool:
    """Return whether wandb has an API key.

    Without one it prompts on the terminal, which would hang a job.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        # Written by `wandb login`
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def _id(config: Config) -> str:
    path = config.run_dir / "wandb_id"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(8)
    with atomic_write(path) as file:
        file.write(run_id + "\n")
    return run_id
