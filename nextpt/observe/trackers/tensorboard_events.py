"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from nextpt.config import Config, to_yaml
from nextpt.events import Event, scalars


class TensorBoardTracker:
    """Scalars against the step. A resumed run hides the points of steps that are made again (`purge_step`)."""

    def __init__(self, config: Config, first_step: int) -> None:
        self._writer = SummaryWriter(config.run_dir / "tensorboard", purge_step=first_step, flush_secs=10)
        self._writer.add_text("config", f"<pre>{to_yaml(config)}</pre>", first_step - 1)

    def on_event(self, event: Event) -> None:
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event.step, walltime=event.time)

    def close(self) -> None:
        self._writer.close()
