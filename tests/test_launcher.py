"""What the launcher knows before anything is started."""

import json
from pathlib import Path

import pytest

from megatron_sfr import cli
from megatron_sfr.launcher import Run, _bar, read_run

SIZES = "train-iters: 7\nmicro_batch_size: 2\nglobal_batch_size: 8\nseq_length: 16\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, SIZES + "save: here\n"), ["--train-iters", "9", "--lr", "1", "--save", "there"])
    assert (run.save, run.train_iters, run.tokens_per_step) == (Path("there"), 9, 8 * 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SIZES, "save is missing"),
        ("a: [", "not YAML"),
        ("- a\n", "not a YAML mapping"),
        (SIZES + "seq-length: 32\nsave: a", "seq_length and seq-length are one option, which is set in line 4"),
        (SIZES.replace("7", "[4]") + "save: a", r"recipe.yaml: train_iters is '\[4\]'; give a whole number"),
    ],
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


def test_dry_run_prints_the_torchrun_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = write(tmp_path, SIZES + "save: here\n")
    assert cli.main(["train", str(recipe), "--nproc", "2", "--dry-run", "--bf16"]) == 0
    printed = capsys.readouterr().out
    assert "torch.distributed.run --standalone --nproc-per-node 2" in printed
    assert printed.strip().endswith(f"-m megatron_sfr.train --recipe {recipe} --bf16")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "absent.yaml", "--nproc", "1"], "absent.yaml: no such recipe"),
        (["train", "absent.yaml", "--nproc", "0"], "at least one process"),
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
