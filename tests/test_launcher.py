"""What the launcher knows before anything is started."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher.api import LaunchConfig

from megatron_sfr import cli
from megatron_sfr.launcher import SHUTDOWN_S, Run, _bar, command, read_run, variables

SIZES = "train-iters: 7\nmicro_batch_size: 2\nglobal_batch_size: 8\nseq_length: 16\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, SIZES + "save: here\n"), ["--train-iters", "9", "--lr", "1", "--save", "there"])
    assert (run.save, run.train_iters, run.tokens_per_step) == (Path("there"), 9, 8 * 16)


@pytest.mark.parametrize(
    ("text", "message"), [(SIZES, "save is missing"), ("a: [", "not a YAML mapping"), ("- a\n", "not a YAML mapping")]
)
def test_what_is_missing_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run(write(tmp_path, text), [])


@pytest.mark.parametrize("loss", ["lm loss", "kl-flow loss"])
def test_the_bar_moves_with_the_steps_of_either_task(tmp_path: Path, loss: str, capsys: pytest.CaptureFixture) -> None:
    bar = _bar(Run(tmp_path, 7, 1), "train")
    next(bar)
    rows = [
        {"step": 1, "time": 0.0, loss: 2.0},
        {"step": 1, "time": 0.5, "entropy": 1.0},
        {"step": 2, "time": 1.0, loss: 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    next(bar)
    bar.close()  # type: ignore[attr-defined]
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "2/7" in shown
    assert f"{loss}=0.500" in shown


def test_torchrun_waits_for_the_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an environment variable: torch 2.11's torchrun refuses --shutdown-timeout, which newer ones have."""
    (name,) = variables(max_restarts=0)
    assert not any("shutdown" in word for word in command(Path("recipe.yaml"), 1, []))
    monkeypatch.setenv(name, variables(0)[name])
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    if hasattr(config, "shutdown_timeout"):
        assert config.shutdown_timeout == SHUTDOWN_S


def test_each_restart_has_a_new_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's handler of the rendezvous reads the variable; the default shares one store between attempts."""
    handler = DynamicRendezvousHandler.__new__(DynamicRendezvousHandler)
    assert handler.use_agent_store
    for name, value in variables(max_restarts=1).items():
        monkeypatch.setenv(name, value)
    assert not handler.use_agent_store


def test_dry_run_prints_the_torchrun_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write(tmp_path, SIZES + "save: here\n")
    assert cli.main(["train", str(recipe), "--nproc", "2", "--max-restarts", "3", "--dry-run", "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3" in printed
    assert printed.startswith("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ")
    assert printed.strip().endswith(f"-m megatron_sfr.train --recipe {recipe} --bf16")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "absent.yaml", "--nproc", "1"], "absent.yaml: no such recipe"),
        (["train", "absent.yaml", "--nproc", "0"], "at least one process"),
        (["train", "absent.yaml", "--max-restarts", "-1"], "give 0 or more"),
    ],
)
def test_wrong_calls_end_with_2_and_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_run_that_has_all_its_steps_is_not_started_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"save: {save}\ntrain_iters: 30\nmicro_batch_size: 2\nseq_length: 8\n", encoding="utf-8")
    save.mkdir()
    (save / "latest_checkpointed_iteration.txt").write_text("30", encoding="utf-8")
    assert cli.main(["train", str(recipe)]) == 0
    assert "has all 30 steps already" in capsys.readouterr().out
    assert not (save / "logs").exists()
