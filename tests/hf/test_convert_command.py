"""megatron-sfr convert: what it prints, and one line with exit code 2 where something is wrong."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
import yaml

from megatron_sfr.cli import main
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from tests.hf.models import CASES, save_model, tiny_config


def convert(*words) -> int:
    return main(["convert", *(str(word) for word in words)])


def refused(capsys, match, *words):
    assert convert(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("megatron-sfr convert: error: ")
    assert match in line


def test_there_and_back(untied, tmp_path, capsys):
    assert convert("import", "--hf", untied, "--output", tmp_path / "megatron", "--check") == 0
    said = capsys.readouterr()
    assert "47 tensors, 0.31 MB, float32, read back bit for bit" in said.out
    assert f"load: {tmp_path / 'megatron'}, finetune: true" in said.out
    assert "import: 100%" in said.err
    export = ("export", "--checkpoint", tmp_path / "megatron", "--like", untied, "--output", tmp_path / "hf")
    assert convert(*export, "--check", untied, "--max-shard-gb", "0.0001") == 0
    said = capsys.readouterr()
    assert "47 tensors, 0.31 MB, float32, in 4 files" in said.out
    assert "0 rows of vocabulary padding cut off\nleft behind: nothing" in said.out
    assert "largest difference 0\n" in said.out
    assert "export: 100%" in said.err


def test_what_cannot_be_read_is_one_line(untied, tmp_path, capsys):
    refused(capsys, "config.json does not exist", "import", "--hf", tmp_path, "--output", tmp_path / "out")
    export = ("export", "--like", untied, "--output", tmp_path / "out", "--checkpoint", tmp_path)
    refused(capsys, "no checkpoint here", *export)
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_is_an_error(imported, untied, tmp_path, capsys):
    other = save_model(tmp_path / "other", seed=1)
    export = ("export", "--checkpoint", imported, "--like", untied, "--output", tmp_path / "hf", "--check", other)
    refused(capsys, "is not the model of", *export)


def test_tolerance_of_no_check_is_an_error(imported, untied, tmp_path, capsys):
    export = ("export", "--checkpoint", imported, "--like", untied, "--output", tmp_path / "hf", "--tolerance", 1)
    refused(capsys, "give --check", *export)


@pytest.mark.parametrize("workers", [2, 9])
def test_any_number_of_workers_writes_the_same_bytes(imported, untied, tmp_path, workers):
    """Files of 50 kB end inside q, k, v and gate, up; there are more files than workers, and fewer."""
    export = ("export", "--checkpoint", imported, "--like", untied, "--max-shard-gb", "0.00005")
    for n in (1, workers):
        assert convert(*export, "--output", tmp_path / str(n), "--workers", n) == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "1").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) == 6
    assert {file.name: file.read_bytes() for file in (tmp_path / str(workers)).iterdir()} == files


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_folder_that_cannot_be_written_is_one_line(imported, untied, tmp_path, verb):
    """In a process without root's right to write everywhere."""
    source = ["--hf", untied] if verb == "import" else ["--checkpoint", imported, "--like", untied]
    (tmp_path / "locked").mkdir(mode=0o555)
    drop = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    command = [
        sys.executable,
        "-m",
        "megatron_sfr.cli",
        "convert",
        verb,
        *source,
        "--output",
        tmp_path / "locked" / "x",
    ]
    done = subprocess.run([*drop, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "the location is not writable: choose another --output" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "locked").iterdir()) == []


@pytest.mark.parametrize("verb", ["import", "export", "export --workers 2 --max-shard-gb 0.00015"])
def test_a_full_disk_is_one_line_and_leaves_nothing(imported, untied, tmp_path, capsys, verb):
    """A limit on the size of a file stands for the disk."""
    verb, *options = verb.split()
    source = ("--hf", untied) if verb == "import" else ("--checkpoint", imported, "--like", untied)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(capsys, "the disk is full", verb, *source, *options, "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for the weights, and for nothing else."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320k", "none", str(tmp_path / "disk")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_that_fills_up_on_the_way(untied, small_disk, capsys):
    refused(capsys, "No space left on device", "import", "--hf", untied, "--output", small_disk / "out")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("case", CASES)
def test_recipe_is_yaml_of_the_flags(tmp_path, capsys, case):
    architecture, changes = CASES[case]
    tiny_config(architecture, architectures=[architecture], **changes).save_pretrained(tmp_path)
    assert convert("recipe", "--hf", tmp_path) == 0
    assert yaml.safe_load(capsys.readouterr().out) == megatron_flags(read_config(tmp_path))
