"""A synchronous save starts no process.

Not exercised: an asynchronous one, whose writer upstream places on a GPU.
"""

from pathlib import Path

import pytest

from tests import warm


@pytest.mark.distributed
def test_a_synchronous_save_starts_no_process(tmp_path: Path) -> None:
    program = Path(__file__).with_name("save_program.py")
    done = warm.run(str(program), str(tmp_path), ranks=1, check=True)
    assert done.stdout.splitlines() == ["processes: 0", "equal: True"]
