"""A checkpoint that does not fit the disk is not begun, on a file system that is too small for it."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sfr.hf.megatron.disk_room import size_of
from megatron_sfr.hf.megatron.tracker import complete_steps
from tests import warm

from .runs import Runs
from .settings import EACH_STEP, PP2, SHARDED_OPTIMIZER

pytestmark = pytest.mark.distributed


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of a size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def ends_without_room(runs: Runs, save: Path, ranks: int, *flags: str) -> str:
    """The line in which a run ends that finds no room in SAVE."""
    recipe = ("--recipe", str(runs.sfr), "--save", str(save), *EACH_STEP, *flags)
    done = warm.run("-m", "megatron_sfr.train", *recipe, ranks=ranks)
    lines = [line for line in done.stderr.splitlines() if line.startswith("megatron-sfr train: error: ")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(lines) >= 1
    return lines[0]


@pytest.mark.parametrize("disk", ["9m"], indirect=True)
def test_a_first_checkpoint_that_does_not_fit_is_not_begun(runs: Runs, disk: Path) -> None:
    """Two stages, of which the flow head is on one, and the optimizer is divided."""
    line = ends_without_room(runs, disk / "run", 2, *PP2, *SHARDED_OPTIMIZER)
    (needed,) = set(re.findall(r"the checkpoint of step 1 needs ([\d.]+) GB", line))  # of both ranks
    assert 1e9 * float(needed) == pytest.approx(size_of(Path(runs.start()[1])), rel=0.15)
    assert line.endswith("the run resumes from its beginning")
    assert list((disk / "run").glob("iter_*")) == []


@pytest.mark.parametrize("disk", ["25m"], indirect=True)
def test_the_size_of_a_later_one_is_that_of_the_one_before(runs: Runs, disk: Path) -> None:
    line = ends_without_room(runs, disk / "run", 1)
    assert "the checkpoint of step 2 needs" in line
    assert line.endswith("the run resumes from step 1")
    assert complete_steps(disk / "run") == [1]
    assert [path.name for path in (disk / "run").glob("iter_*")] == ["iter_0000001"]
    assert size_of(disk / "run") < 25 << 20
