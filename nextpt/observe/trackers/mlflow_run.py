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

# The first use of a database tells of each table
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
LONGEST_PARAM = 500  # characters, the bound of older servers


class MlflowTracker:
    """One MLflow run per run folder: its id is kept in RUN/mlflow_id, so that a resumed run goes on in the same place."""

    def __init__(self, config: Config) -> None:
        section = config.trackers.mlflow
        root = config.run_dir.absolute().parent
        root.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=section.uri or f"sqlite:///{root / 'mlflow.db'}")
        self._run_id = self._existing(config.run_dir / "mlflow_id") or self._new(
            config, section.experiment
        )

    def on_event(self, event: Event) -> None:
        milliseconds = int(1000 * event.time)
        found = [
            Metric(name, value, milliseconds, event.step) for name, value in scalars(event).items()
        ]
        self._client.log_batch(self._run_id, metrics=found)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)

    def _existing(self, path: Path) -> str | None:
        """The run of an earlier start, opened again; None where this database does not know it."""
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
        run_id = self._client.create_run(experiment_id, run_name=config.run.name).info.run_id
        values = flatten(config.model_dump(mode="json"))
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in values.items()]
        for start in range(0, len(params), 100):  # the most a server takes at once
            self._client.log_batch(run_id, params=params[start : start + 100])
        with atomic_write(config.run_dir / "mlflow_id") as file:
            file.write(run_id + "\n")
        return run_id
