"""Selection of trackers by the config, the check of their libraries, isolation of failures."""

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


class FailSafeTracker:
    """A tracker whose failure does not end the training.

    The first failure is printed and the tracker gets no further events; metrics.jsonl has them all.
    """

    def __init__(self, name: str, tracker: Listener) -> None:
        self.name = name
        self._tracker: Listener | None = tracker

    def on_event(self, event: Event) -> None:
        """Send an event."""
        self._try(lambda tracker: tracker.on_event(event))

    def close(self) -> None:
        """Close the tracker."""
        self._try(lambda tracker: tracker.close())

    def _try(self, action: Callable[[Listener], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:
            self._tracker = None
            print(
                f"warning: {self.name} stopped ({_one_line(error)}); training continues without it",
                file=sys.stderr,
                flush=True,
            )


def selected_trackers(config: Config) -> list[str]:
    """Return the names of the trackers that the config selects, besides JSON lines."""
    return [name for name in LIBRARIES if getattr(config.trackers, name)]


def check_trackers(config: Config) -> None:
    """Raise ConfigError when the library of a selected tracker is not installed."""
    for name in selected_trackers(config):
        missing = [module for module in LIBRARIES[name] if importlib.util.find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"trackers.{name}: {', '.join(missing)} is not installed; pip install"
                f" 'nextpt[trackers]', or remove trackers.{name} from the config"
            )


def open_trackers(config: Config, first_step: int) -> list[Listener]:
    """Open the selected trackers, which `check_trackers` has checked.

    Args:
        config: The run.
        first_step: 1, or the next step of a resumed run.

    Raises:
        UserError: One cannot start; those opened before are closed.
    """
    opened: list[Listener] = []
    for name in selected_trackers(config):
        try:
            opened.append(FailSafeTracker(name, _open(name, config, first_step)))
        except Exception as error:
            for tracker in opened:
                tracker.close()
            if isinstance(error, UserError):
                raise
            raise UserError(f"trackers.{name} cannot start: {_one_line(error)}") from error
    return opened


def _open(name: str, config: Config, first_step: int) -> Listener:
    """Open one tracker; its library is imported here, which takes seconds."""
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
