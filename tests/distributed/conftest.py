"""The runs that tests share. A test names the run that it needs; asking for it trains it."""

import os
from pathlib import Path

import pytest

from .runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in that of the session
        folder = folder.parent
    (folder / "runs").mkdir(exist_ok=True)
    return Runs(Path(folder, "runs"))
