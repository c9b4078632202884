"""For all tests: nothing is downloaded, and tests marked gpu are skipped where there is no CUDA device."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        from megatron_sfr.runtime.devices import gpus

        if not gpus():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
