"""Atomic writes: what a killed process leaves beside a file is removed by the next write, and nothing else is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.manifest import NAME, publish, staging
from megatron_sfr.storage.resumable import resumable

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


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    """As of an output on another disk: a rename would fail between disks, or put a file in the place of the link."""
    target, link = tmp_path / "disk/a.json", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("old", "new"):
        with replacing(link) as file:
            assert Path(file.name).parent == target.parent
            file.write(text)
        assert (link.is_symlink(), target.read_text()) == (True, text)


def test_a_link_to_a_folder_is_published_where_it_points(tmp_path: Path) -> None:
    target, link = tmp_path / "disk/out", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("old", "new"):
        with staging(link, keep=True) as folder:
            assert folder.parent == target.parent
            (folder / NAME).write_text(text)
            publish(folder, link)
        assert (link.is_symlink(), (target / NAME).read_text()) == (True, text)
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_command_that_fails_before_its_first_line_does_not_stand_in_the_way_of_another(tmp_path: Path) -> None:
    def fail(seed: int, lines: int) -> None:
        with resumable(tmp_path / "out.jsonl", {"seed": seed}, lambda done: done) as (file, _):
            file.write("line\n" * lines)
            raise RuntimeError

    for seed, lines in ((1, 0), (2, 1)):
        with pytest.raises(RuntimeError):
            fail(seed, lines)
        assert bool(list(tmp_path.iterdir())) == bool(lines)
    with (
        pytest.raises(ValueError, match="was begun by another command, with other values of seed"),
        resumable(tmp_path / "out.jsonl", {"seed": 3}, lambda done: done),
    ):
        raise AssertionError("not reached")


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
