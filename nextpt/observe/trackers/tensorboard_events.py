"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from nextpt.config import Config, to_yaml
from nextpt.events import Event, RollbackEvent, scalars


class TensorBoardTracker:
    """Scalars against the step.

    After a resume or a rollback the points of repeated steps are hidden (`purge_step`).
    """

    def __init__(self, config: Config, first_step: int) -> None:
        self._folder = config.run_dir / "tensorboard"
        self._writer = self._open(first_step)
        self._writer.add_text("config", f"<pre>{to_yaml(config)}</pre>", first_step - 1)

    def _open(self, first_step: int) -> SummaryWriter:
        return SummaryWriter(self._folder, purge_step=first_step, flush_secs=10)

    def on_event(self, event: Event) -> None:
        """Write the scalars of an event."""
        if isinstance(event, RollbackEvent):
            self._writer.close()
            self._writer = self._open(event.step + 1)
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event.step, walltime=event.time)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
