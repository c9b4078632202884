"""What the CPU backend replaces behaves as upstream's own, and the arguments that it changes exist."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from megatron_sfr.runtime import cpu
from megatron_sfr.runtime.backend import CPU_CHANGES, CPU_REFUSALS, adapt_flags, choose
from megatron_sfr.runtime.replacements import VERSIONS
from tests import warm


@pytest.mark.parametrize("package", VERSIONS)
def test_the_tables_are_written_for_the_installed_version(package: str) -> None:
    assert importlib.metadata.version(package).split("+")[0] == VERSIONS[package]


def test_a_rank_imports_no_compiler_and_no_cuda_package(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    names = ("megatron.training", "torch._inductor.compile_fx", *cpu.HIDDEN_PACKAGES)
    program.write_text(f"import sys; print([name for name in {names} if sys.modules.get(name)])", encoding="utf-8")
    assert warm.run(str(program), check=True).stdout.strip() == "['megatron.training']"


def test_cuda_is_read_as_cpu_inside_the_mode_only() -> None:
    with cpu.CudaMeansCpu():
        made = [
            torch.zeros(2, device="cuda"),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
            torch.empty(2, pin_memory=True),
            torch.ones(2).cuda(),
            torch.ones(2).to("cuda:0"),
        ]
        assert {x.device.type for x in made} == {"cpu"}
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"
    assert torch.ones(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("window", [(0, 0), (3, 0), (20, 0)])
def test_the_mask_of_a_window_is_upstreams(window: tuple[int, int]) -> None:
    from megatron.core.transformer.utils import get_sliding_window_causal_mask

    with cpu.CudaMeansCpu():
        wanted = get_sliding_window_causal_mask(7, 7, window)
    assert torch.equal(cpu._window_mask(7, 7, window), wanted)


def test_the_memory_of_an_output_lives_until_its_backward_pass() -> None:
    """As on CUDA upstream replaces the output by one number; gloo's sends still read what it was."""
    from megatron.core.pipeline_parallel import schedules

    free = cpu._freed_after_backward(schedules.deallocate_output_tensor)
    x = torch.ones(3, requires_grad=True)
    out = x * 2
    free(out, True)
    assert out.shape == (1,)
    assert out.grad_fn.metadata["data"].tolist() == [2, 2, 2]
    schedules.custom_backward(out, torch.ones(3))
    assert x.grad.tolist() == [2, 2, 2]
    with pytest.raises(AssertionError, match="view"):  # our losses must not be views either
        free((x * 2).view(3, 1), True)


def test_changes_and_refusals_name_arguments_that_exist() -> None:
    from megatron_sfr.config.settings import Parser

    parser = Parser()
    dests = {action.dest for action in parser._actions}
    assert {c.dest for c in CPU_CHANGES} | {r.dest for r in CPU_REFUSALS} <= dests
    for change in CPU_CHANGES:
        assert getattr(parser.read(change.flags), change.dest) == change.value


def test_experts_cut_both_ways_are_refused() -> None:
    from megatron_sfr.config.settings import Parser

    flags = ["--num-experts", "4", "--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    with pytest.raises(ValueError, match="gloo gathers equal sizes only; set --expert-tensor-parallel-size 1"):
        adapt_flags("cpu", Parser().read(flags))
    adapt_flags("cpu", Parser().read([*flags, "--expert-tensor-parallel-size", "1"]))


def test_recomputed_norms_are_refused() -> None:
    """Upstream's recomputation of them reads a name that it imports from Transformer Engine."""
    from megatron_sfr.config.settings import Parser

    flags = ["--recompute-granularity", "selective", "--recompute-modules", "mlp"]
    adapt_flags("cpu", Parser().read(flags))
    with pytest.raises(ValueError, match=r"^--recompute-modules cannot work on CPU: .* leave layernorm out$"):
        adapt_flags("cpu", Parser().read([*flags, "layernorm"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is there")
def test_cuda_that_is_not_there_is_refused_in_one_line() -> None:
    assert choose("auto") == "cpu"
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        choose("cuda")
