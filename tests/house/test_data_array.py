"""launch/data.sbatch outside of Slurm: what each part of an array takes, what `list` writes, and what is refused."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launch/data.sbatch"
FILES = [f"raw/{i} a.jsonl" for i in range(7)]


def bash(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(["bash", SCRIPT, *words], cwd=ROOT, env=kept | variables, capture_output=True, text=True)


def part(verb: str, *words: str, **variables: str) -> list[str]:
    done = bash(verb, "--dry-run", "/data", *words, MEGATRON_SFR="sfr", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def inputs_of(command: list[str]) -> list[str]:
    return command[command.index("--input") + 1 : command.index("--tokenizer")]


@pytest.mark.parametrize("first", [0, 1])
def test_the_parts_take_each_file_once_and_write_separate_folders(first: int) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": str(first)}
    commands = [part("prepare", *FILES, SLURM_ARRAY_TASK_ID=str(first + k), **array) for k in range(3)]
    assert [inputs_of(command) for command in commands] == [FILES[k::3] for k in range(3)]
    folders = [command[command.index("--output") + 1] for command in commands]
    assert folders == [f"/data/part-000{k}-of-0003" for k in range(3)]
    assert commands[0][:3] == ["srun", "sfr", "prepare"]
    embeds = [part("embed", SLURM_ARRAY_TASK_ID=str(first + k), **array) for k in range(3)]
    assert [command[command.index("--data") + 1] for command in embeds] == folders


def test_a_part_that_runs_again_takes_the_same_files() -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_ID": "2"}
    assert inputs_of(part("prepare", *FILES, PARTS="3", **array)) == FILES[2::3]


def test_list_names_the_complete_parts_for_a_recipe(tmp_path: Path) -> None:
    folders = [tmp_path / f"part-{k:04}-of-0010" for k in range(10)]
    for folder in folders:
        folder.mkdir()
        (folder / "manifest.json").touch()
    assert yaml.safe_load(bash("list", str(tmp_path)).stdout) == {
        "train_data_path": [str(folder) for folder in folders]
    }
    (folders[3] / "manifest.json").unlink()
    assert f"{folders[3]} is not complete: submit the same" in bash("list", str(tmp_path)).stderr
    folders[3].rmdir()
    assert "has 9 folders of 10 parts" in bash("list", str(tmp_path)).stderr


@pytest.mark.parametrize(
    ("words", "variables", "reason"),
    [
        ((), {}, "usage: sbatch --array=0-N launch/data.sbatch"),
        (("build", "/data"), {}, "usage: sbatch"),
        (("prepare", "/data", "a.jsonl"), {}, "this is not a job of a Slurm array"),
        (("prepare", "--dry-run", "/data", "a.jsonl"), {"PARTS": "2"}, "1 files for 2 parts: give at least as many"),
        (("list", "/nowhere"), {}, "/nowhere has no parts"),
        (
            ("embed", "--dry-run", "/data"),
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "2", "PARTS": "4"},
            "part 5 of 4: set PARTS",
        ),
    ],
)
def test_a_wrong_start_is_one_line(words: tuple[str, ...], variables: dict[str, str], reason: str) -> None:
    done = bash(*words, **variables)
    assert done.returncode != 0
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_site_block_is_at_the_top_and_the_file_is_short() -> None:
    lines = (ROOT / SCRIPT).read_text().splitlines()
    assert len(lines) <= 80
    assert any("site: the data" in line for line in lines[:25])
