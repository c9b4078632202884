"""Atomic writes: what a killed process leaves beside a file is removed by the next write, and nothing else is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sfr.storage.atomic import replacing

KILLED = """
import os, pathlib, signal, sys
from megatron_sfr.storage.atomic import replacing
with replacing(pathlib.Path(sys.argv[1])) as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    path.write_text("old")
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(path) as file:
        file.write("new")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a[1].json", "new")]


def test_files_of_running_processes_and_of_other_machines_stay(tmp_path: Path) -> None:
    host = os.uname().nodename
    names = {f".a.json.{host}-{os.getppid()}.partial", ".a.json.elsewhere-1.partial", f".a.json.{host}-x.partial"}
    for name in names:
        (tmp_path / name).touch()
    with replacing(tmp_path / "a.json") as file:
        file.write("new")
    assert {found.name for found in tmp_path.iterdir()} == {*names, "a.json"}


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as file:
            file.write("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [found.read_text() for found in tmp_path.iterdir()] == ["old"]
