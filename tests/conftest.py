"""For all tests: no downloads, the CPU backend except under `-m gpu`, and what is shared is made once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

SHARE_RUNS = ("test_layouts", "test_objectives", "test_phases", "test_resume", "test_online", "test_kl_flow")

os.environ["HF_HUB_OFFLINE"] = "1"
hypothesis.settings.register_profile("house", deadline=None)  # no timing in tests: another process may have the cores
hypothesis.settings.load_profile("house")


class ByWhatIsShared(LoadFileScheduling):
    """A file's tests stay in one process, and so do those of the files that look at the same training runs."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "runs" if Path(file).stem in SHARE_RUNS and "distributed" in file else file


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs and their packages: the tests are of the CPU backend, but for those that `-m gpu` selects."""
    if config.getoption("markexpr") != "gpu":
        from megatron_sfr.runtime.cpu import hide_cuda_packages

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        hide_cuda_packages()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByWhatIsShared:
    return ByWhatIsShared(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
