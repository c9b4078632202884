"""For all tests: no downloads, the CPU backend except under `-m gpu`; with pytest-xdist a file stays in one process."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

os.environ["HF_HUB_OFFLINE"] = "1"
hypothesis.settings.register_profile("house", deadline=None)  # no timing in tests: another process may have the cores
hypothesis.settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs and their packages: the tests are of the CPU backend, but for those that `-m gpu` selects."""
    if config.getoption("markexpr") != "gpu":
        from megatron_sfr.runtime.cpu import before_megatron

        before_megatron()


def pytest_unconfigure() -> None:
    if "tests.warm" in sys.modules:
        sys.modules["tests.warm"].stop()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    config.option.loadscopereorder = False  # files start in the order below
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # long files first, or one process ends with one of them alone
        long = ("slow", "distributed")
        items.sort(key=lambda item: [item.get_closest_marker(marker) is None for marker in long])
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        from megatron_sfr.runtime.devices import gpus

        if not gpus():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu (make gpu)"))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process as the only rank, with Megatron's process groups on gloo."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
