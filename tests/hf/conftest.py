"""HF folders that many tests read, and the checkpoints imported from them; made once."""

from pathlib import Path

import pytest

from megatron_sfr.hf.import_hf import import_hf
from tests.hf.models import save_model


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("untied") / "hf")


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied") / "hf", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def imported(untied: Path) -> Path:
    """The untied model as a Megatron checkpoint."""
    import_hf(untied, untied.parent / "megatron", progress=False)
    return untied.parent / "megatron"
