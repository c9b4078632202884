"""One process at a time holds the lock of an output, the other one learns who; a kill releases it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sfr.storage.lock import hold, lock_file

HOLDS = """
import os, sys, time
from pathlib import Path
from megatron_sfr.storage.lock import hold
with hold(Path(sys.argv[1])):
    if os.fork() == 0:  # as a DataLoader starts its workers
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of tmp_path/out, and has forked another one meanwhile."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_the_second_is_refused_and_the_holder_is_named(tmp_path: Path, holder: subprocess.Popen) -> None:
    said = rf"out is being written by process {holder.pid} on \S+ since \d+-\d+-\d+ .*; wait for it, or stop it"
    with pytest.raises(ValueError, match=said), hold(tmp_path / "out"):
        raise AssertionError("not reached")


def test_a_kill_releases_it_though_a_child_lives_on(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.kill()
    with hold(tmp_path / "out", wait=30):  # the system needs a moment to end it
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_and_its_target_have_one_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for inside in (False, True):
        with (
            hold(tmp_path / "out", inside=inside),
            pytest.raises(ValueError, match="is being written"),
            hold(tmp_path / "link", inside=inside),
        ):
            raise AssertionError("not reached")


def test_what_cannot_be_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path / "file", tmp_path / "file/out", tmp_path / ("x" * 300), tmp_path / "loop"):
        with pytest.raises(ValueError, match="cannot be a folder to write"), hold(output, inside=True):
            raise AssertionError("not reached")


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    for _ in range(2):
        with hold(tmp_path / "deep" / "out"):
            assert [path.name for path in (tmp_path / "deep").iterdir()] == [".out.lock"]
        with hold(tmp_path / "deep", inside=True):
            assert lock_file(tmp_path / "deep", inside=True).exists()
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_empty_folder_is_removed(tmp_path: Path) -> None:
    with hold(tmp_path / "out", inside=True):
        assert (tmp_path / "out").is_dir()
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "out", inside=True):
        (tmp_path / "out" / "report").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report"]


def test_it_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), hold(tmp_path / "out"):
        raise KeyError
    with hold(tmp_path / "out"), pytest.raises(ValueError, match=f"process {os.getpid()}"), hold(tmp_path / "out"):
        pass


def test_waiting_is_bounded(tmp_path: Path) -> None:
    with hold(tmp_path / "out"):
        began = time.monotonic()
        with pytest.raises(ValueError, match="is being written"), hold(tmp_path / "out", wait=0.3):
            pass
        assert time.monotonic() - began >= 0.3


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path / "out"):
        assert "has no locks (Function not implemented)" in caplog.text
