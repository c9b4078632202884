"""A W&B writer that fails ends no training: one warning, and nothing more is sent."""

from typing import Any

import pytest
from megatron.core.timers import Timers
from megatron.training import global_vars, wandb_utils

from megatron_sfr.runtime.replacements import replaced
from megatron_sfr.training.tracking.wandb_guard import replacements


class Service:
    """Stands for the wandb module, whose service was killed after two calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) > 2:
            raise ConnectionResetError("Connection lost")

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._call(f"log {step}")

    def finish(self) -> None:
        self._call("finish")

    def Artifact(self, *_: Any, **__: Any) -> None:
        self._call("artifact")


@pytest.mark.parametrize("last", ["log", "save", "finish"])
def test_a_failure_is_one_warning_and_the_rest_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, last: str
) -> None:
    service = Service()
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", service)
    with replaced(replacements()):
        writer = global_vars.get_wandb_writer()
        assert writer
        for step in (1, 2):
            writer.log({"lm loss": 1.0}, step)
        for _ in range(2):
            if last == "log":
                writer.log({"lm loss": 1.0}, 3)
            elif last == "save":
                wandb_utils.on_save_checkpoint_success("run/iter_3", "run/latest", "run", 3)
            else:
                writer.finish()
        assert not writer, "upstream asks before each call"
    assert len(service.calls) == 3
    (record,) = caplog.records
    assert "W&B fails, and gets nothing more of this run (ConnectionResetError: Connection lost)" in record.message


def test_upstreams_timers_reach_the_guarded_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", service)
    timers = Timers(log_level=0, log_option="max")
    monkeypatch.setattr(timers, "_get_global_min_max_time", lambda *_: {"step": (1.0, 2.0)})  # needs a process group
    with replaced(replacements()):
        timers.write(["step"], global_vars.get_wandb_writer(), 7)
    assert service.calls == ["log 7"]
