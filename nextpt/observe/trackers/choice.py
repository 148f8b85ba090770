"""Which trackers a config asks for, whether their libraries are there, and what happens when one fails."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

from nextpt.base.errors import ConfigError, UserError
from nextpt.config import Config
from nextpt.events import Event, Listener

# key of the section -> modules its library consists of
LIBRARIES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy"),
}


class Guarded:
    """A tracker that may fail without ending the training: the first failure is told once, then it hears no more.

    Weeks of training are worth more than their curve: metrics.jsonl still has all of it.
    """

    def __init__(self, name: str, tracker: Listener) -> None:
        self.name, self._tracker = name, tracker

    def on_event(self, event: Event) -> None:
        self._try(lambda tracker: tracker.on_event(event))

    def close(self) -> None:
        self._try(lambda tracker: tracker.close())

    def _try(self, action: Callable[[Listener], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            print(
                f"warning: {self.name} stopped ({_one_line(error)}); training goes on without it",
                file=sys.stderr,
                flush=True,
            )


def chosen(config: Config) -> list[str]:
    """Names of the trackers that the config switches on, besides JSON lines."""
    return [name for name in LIBRARIES if getattr(config.trackers, name)]


def check_trackers(config: Config) -> None:
    """Raise ConfigError when the library of a chosen tracker is not installed. Opens nothing."""
    for name in chosen(config):
        missing = [module for module in LIBRARIES[name] if importlib.util.find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"trackers.{name}: {', '.join(missing)} is not installed; pip install"
                f" 'nextpt[trackers]', or take trackers.{name} out of the config"
            )


def open_trackers(config: Config, first_step: int) -> list[Listener]:
    """Start the chosen trackers, which `check_trackers` has passed. first_step: 1, or where a resumed run goes on.

    Raises UserError, with everything opened so far closed, when one cannot start.
    """
    opened: list[Listener] = []
    for name in chosen(config):
        try:
            opened.append(Guarded(name, _open(name, config, first_step)))
        except Exception as error:
            for tracker in opened:
                tracker.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"trackers.{name} cannot start: {_one_line(error)}") from error
    return opened


def _open(name: str, config: Config, first_step: int) -> Listener:
    """The libraries are imported only when chosen: they take seconds."""
    if name == "tensorboard":
        from nextpt.observe.trackers.tensorboard_events import TensorBoardTracker

        return TensorBoardTracker(config, first_step)
    if name == "wandb":
        from nextpt.observe.trackers.wandb_run import WandbTracker

        return WandbTracker(config)
    from nextpt.observe.trackers.mlflow_run import MlflowTracker

    return MlflowTracker(config)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
