"""MLflow: a local database or a tracking server."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from nextpt.base.files import atomic_write
from nextpt.config import Config, flatten
from nextpt.events import Event, scalars

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

# The first use of a database logs every table
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
MAX_PARAM_LENGTH = 500  # characters, the bound of older servers


class MlflowTracker:
    """One MLflow run per run folder; a resumed run continues it by the id in RUN/mlflow_id."""

    def __init__(self, config: Config) -> None:
        section = config.trackers.mlflow
        assert section is not None  # selected by the config
        root = config.run_dir.absolute().parent
        root.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=section.uri or f"sqlite:///{root / 'mlflow.db'}")
        self._run_id = self._existing(config.run_dir / "mlflow_id") or self._new(
            config, section.experiment
        )

    def on_event(self, event: Event) -> None:
        """Log the metrics of an event."""
        milliseconds = int(1000 * event.time)
        metrics = [
            Metric(name, value, milliseconds, event.step) for name, value in scalars(event).items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)

    def _existing(self, path: Path) -> str | None:
        """Reopen the run of an earlier start; None where this database does not have it."""
        if not path.exists():
            return None
        run_id = path.read_text(encoding="utf-8").strip()
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return None
        return run_id

    def _new(self, config: Config, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        run_id: str = self._client.create_run(experiment_id, run_name=config.run.name).info.run_id
        values = flatten(config.model_dump(mode="json"))
        params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in values.items()]
        for start in range(0, len(params), 100):  # the maximum of one request
            self._client.log_batch(run_id, params=params[start : start + 100])
        with atomic_write(config.run_dir / "mlflow_id") as file:
            file.write(run_id + "\n")
        return run_id
