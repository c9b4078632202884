"""The lines of metrics.jsonl as metrics of an MLflow run. mlflow is an optional dependency.

A thread sends them, so that a slow or unreachable server does not delay the training.
"""

import json
import logging
import os
import queue
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sfr.option_names import named
from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.user_files import read_json_object, reason

RUN = "mlflow_run.json"
"""The run's id in SAVE: a resumed training continues the same run."""
LAST_LINES_S = 30.0
"""How long the end of a training waits for lines that are not sent yet."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Variables that bound a request, unless the user sets them. MLflow's defaults keep a training with an unreachable
server waiting for up to 20 minutes at its start, and again at its end."""
MOST_PARAMS, LONGEST_PARAM, LONGEST_NAME = 100, 500, 250  # MLflow's limits, of older servers too
LOGGER = logging.getLogger(__name__)


@named("mlflow_")
@dataclass(frozen=True)
class MLflowOptions:
    """Logging to MLflow, beside TensorBoard and metrics.jsonl."""

    experiment: str | None = None
    """Name of an MLflow experiment, which gets the run's options and the scalars of metrics.jsonl. The variable
    MLFLOW_TRACKING_URI says where it is. Needs the package mlflow or mlflow-skinny. Default: no MLflow."""
    run_name: str | None = None
    """Name of the run in the experiment. Default: the name of the `save` folder."""

    def __post_init__(self) -> None:
        if self.run_name is not None and self.experiment is None:
            raise ValueError("`run_name` has no effect without `experiment`: set that, or leave it out")


class MLflowLog:
    """A run of MLflow that gets the scalars of each step."""

    def __init__(self, options: MLflowOptions, save: Path, parameters: Mapping[str, Any]) -> None:
        """Begins a run with these parameters, or continues the one that SAVE names.

        Raises:
            ValueError: mlflow is not installed, or its server cannot be used.
        """
        try:
            import mlflow
            from mlflow.entities import Metric, Param
        except ImportError as error:
            raise ValueError(
                "mlflow_experiment: mlflow is not installed; run: pip install mlflow-skinny, or leave the option out"
            ) from error
        self._metric = Metric
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        try:
            self._client = mlflow.MlflowClient()
            self._run = self._open(options, save, [Param(*pair) for pair in _shortened(parameters)])
        except Exception as error:  # of requests, of its stores, and MLflow's own
            raise ValueError(
                f"mlflow_experiment {options.experiment}: {reason(error)}; correct MLFLOW_TRACKING_URI "
                f"({mlflow.get_tracking_uri()}), or leave the option out"
            ) from error
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def _open(self, options: MLflowOptions, save: Path, params: list[Any]) -> str:
        """The id of the run."""
        client, path, name = self._client, save / RUN, options.experiment
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        known = read_json_object(path, "remove it, and a new run begins") if path.exists() else {}
        if known.get("experiment") == experiment:
            client.update_run(known["run"], status="RUNNING")
            return str(known["run"])
        run = client.create_run(experiment, run_name=options.run_name or save.resolve().name).info.run_id
        for start in range(0, len(params), MOST_PARAMS):
            client.log_batch(run, params=params[start : start + MOST_PARAMS])
        with replacing(path) as file:
            json.dump({"experiment": experiment, "run": run}, file)
        return run

    def add(self, line: dict[str, Any]) -> None:
        """Queues a line of metrics.jsonl to be sent."""
        self._lines.put(line)

    def close(self, *, failed: bool = False) -> None:
        """Ends the run when all lines are sent, or after LAST_LINES_S."""
        self._lines.put(None)
        self._thread.join(LAST_LINES_S)
        if self._thread.is_alive():
            LOGGER.warning("warning: the last lines could not be sent to MLflow in %g s", LAST_LINES_S)
            return
        try:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
        except Exception as error:
            LOGGER.warning("warning: MLflow cannot end the run: %s", reason(error))

    def _send(self) -> None:
        while (line := self._lines.get()) is not None:
            at, step = int(1000 * line["time"]), line["step"]
            values = {key: value for key, value in line.items() if key not in ("time", "step") and type(value) is float}
            metrics = [self._metric(metric_name(key), value, at, step) for key, value in values.items()]
            try:
                self._client.log_batch(self._run, metrics=metrics)
            except Exception as error:  # the training is worth more than its log
                LOGGER.warning("warning: the metrics of step %d could not be sent to MLflow: %s", step, reason(error))


def metric_name(name: str) -> str:
    """A name that MLflow accepts: letters, digits and `_-. /`, without empty path parts. Personas may have others."""
    parts = (re.sub(r"[^\w\-. ]", "_", part).strip(".") or "_" for part in name.split("/"))
    return "/".join(parts)[:LONGEST_NAME].rstrip("/.")


def _shortened(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)[:LONGEST_PARAM]) for name, value in parameters.items() if value is not None]
