"""The runs that tests share. A test names the run that it needs; asking for it trains it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> "Runs":
    from .runs import Runs  # imports Megatron, from which ../conftest.py first hides the packages of CUDA

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in that of the session
        folder = folder.parent
    (folder / "runs").mkdir(exist_ok=True)
    return Runs(Path(folder, "runs"))
