"""Metrics in MLflow, through the package itself and its store of files; skipped where it is not installed."""

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from megatron_sfr.training.metrics_log import JsonLines
from megatron_sfr.training.tracking.mlflow_log import PATIENCE, MLflowLog, MLflowOptions, metric_name

OPTIONS = MLflowOptions("personas")


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, with a store below tmp_path."""
    package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return package


def write(save: Path, *steps: int, resumed: int = 0, failed: bool = False) -> None:
    """A training of these steps, whose metrics go to metrics.jsonl and to MLflow."""
    save.mkdir(exist_ok=True)
    log = MLflowLog(OPTIONS, save, {"lr": 0.1, "bf16": None, "train_data_path": ["x" * 900]})
    lines = JsonLines(save / "metrics.jsonl", lambda: resumed, log)
    for step in steps:
        lines.add("lm loss", 1 / step, step)
        lines.add("lm loss by persona/Köchin: 7, süß", 2 / step, step)
        lines.add_table("by persona", {"poet": {"lm loss": 1.0}}, step)
    lines.close(failed=failed)


def test_metrics_and_options_are_in_one_run(mlflow: Any, tmp_path: Path) -> None:
    write(tmp_path / "save", 1, 2, failed=True)
    write(tmp_path / "save", 3, resumed=2)  # continues the run
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("personas")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("save", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "lm loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.metrics.keys() == {"lm loss", "lm loss by persona/Köchin_ 7_ süß"}
    assert run.data.params["lr"] == "0.1"
    assert "bf16" not in run.data.params


def test_a_store_that_fails_costs_no_step(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file is in the place of a metric's folder: the step is reported, and the training continues."""
    (tmp_path / "save").mkdir()
    log = MLflowLog(OPTIONS, tmp_path / "save", {})
    (folder,) = (tmp_path / "mlruns").glob("*/*/metrics")
    folder.rmdir()
    folder.write_text("")
    log.add({"step": 1, "time": 1.0, "lm loss": 1.0})
    log.close()
    assert "the metrics of step 1 could not be sent to MLflow" in caplog.text


def test_a_server_that_cannot_be_used_is_one_line(mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("no-such-scheme://x", "http://127.0.0.1:9"):  # the second refuses every try
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ValueError, match=r"mlflow_experiment personas: .*; correct MLFLOW_TRACKING_URI"):
            MLflowLog(OPTIONS, tmp_path, {})
    assert os.environ.keys() >= PATIENCE.keys()


def test_a_server_that_fails_is_asked_a_few_times_only(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: Any) -> None:
            pass

    for name in PATIENCE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ValueError, match=r"mlflow_experiment personas: .*; correct MLFLOW_TRACKING_URI"):
            MLflowLog(OPTIONS, tmp_path, {})
        server.shutdown()
    assert len(asked) == 1 + int(PATIENCE["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm loss", "lm loss"),
        ("speed/MFU", "speed/MFU"),
        ("by persona/a/../b", "by persona/a/_/b"),
        ("by persona//x", "by persona/_/x"),
        ("by persona/Dr. #1?", "by persona/Dr. _1_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_that_mlflow_takes(name: str, expected: str) -> None:
    assert metric_name(name) == expected


def test_a_name_without_an_experiment_is_refused() -> None:
    with pytest.raises(ValueError, match="`run_name` has no effect without `experiment`"):
        MLflowOptions(run_name="x")
