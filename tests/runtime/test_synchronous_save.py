"""A synchronous save starts no process. tests/distributed/test_resume.py saves asynchronously."""

from pathlib import Path

import pytest

from tests import warm


@pytest.mark.distributed
def test_a_synchronous_save_starts_no_process(tmp_path: Path) -> None:
    program = Path(__file__).with_name("save_program.py")
    done = warm.run(str(program), str(tmp_path), ranks=1, check=True)
    assert done.stdout.splitlines() == ["processes: 0", "equal: True"]
