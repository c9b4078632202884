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


def bash(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    command = ["bash", str(ROOT / SCRIPT), *words]
    return subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs: raw files, a tokenizer, and three prepared parts."""
    folder = tmp_path_factory.mktemp("data")
    for name in (*FILES, *(f"out/part-000{k}-of-0003/manifest.json" for k in range(3))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "Qwen3-8B").mkdir()
    return folder


def part(data: Path, verb: str, *words: str, **variables: str) -> list[str]:
    done = bash(verb, "--dry-run", "out", *words, cwd=data, MEGATRON_SFR="sfr", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def inputs_of(command: list[str]) -> list[str]:
    return command[command.index("--input") + 1 : command.index("--tokenizer")]


@pytest.mark.parametrize("first", [0, 1])
def test_the_parts_take_each_file_once_and_write_separate_folders(data: Path, first: int) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": str(first)}
    commands = [part(data, "prepare", *FILES, SLURM_ARRAY_TASK_ID=str(first + k), **array) for k in range(3)]
    assert [inputs_of(command) for command in commands] == [FILES[k::3] for k in range(3)]
    folders = [command[command.index("--output") + 1] for command in commands]
    assert folders == [f"out/part-000{k}-of-0003" for k in range(3)]
    assert commands[0][:3] == ["srun", "sfr", "prepare"]
    embeds = [part(data, "embed", SLURM_ARRAY_TASK_ID=str(first + k), **array) for k in range(3)]
    assert [command[command.index("--data") + 1] for command in embeds] == folders


def test_a_part_that_runs_again_takes_the_same_files(data: Path) -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_ID": "2"}
    assert inputs_of(part(data, "prepare", *FILES, PARTS="3", **array)) == FILES[2::3]


@pytest.mark.parametrize(
    ("words", "variables", "missing"),
    [
        (("prepare", "out", FILES[0], "raw/absent.jsonl"), {}, "raw/absent.jsonl"),
        (("prepare", "out", "absent/a.jsonl.gz"), {}, "absent/a.jsonl.gz"),
        (("prepare", "out", "raw/absent"), {}, "raw/absent"),
        (("prepare", "out", FILES[0]), {"TOKENIZER": "absent/"}, "absent/"),
        (("embed", "out"), {"PARTS": "2"}, "out/part-0000-of-0002/manifest.json"),
    ],
)
def test_a_dry_run_names_the_input_that_does_not_exist(
    data: Path, words: tuple[str, ...], variables: dict[str, str], missing: str
) -> None:
    verb, *rest = words
    done = bash(verb, "--dry-run", *rest, cwd=data, **variables)
    assert (done.returncode, done.stderr) == (2, f"{missing} does not exist (on this node)\n")
    assert f" {verb} " in done.stdout


def test_a_name_on_the_hub_is_an_input_that_cannot_be_checked(data: Path) -> None:
    assert inputs_of(part(data, "prepare", "org/chats-v1.1", TOKENIZER="Qwen/Qwen3-8B")) == ["org/chats-v1.1"]


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
