"""The machine code of every specialization for sm_90: no spills, 16-byte loads and stores, rounding to nearest."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if sys.platform != "linux":
    pytest.skip("ptxas comes with Triton's wheel for Linux", allow_module_level=True)

import triton

from megatron_sfr.kernels import fused
from megatron_sfr.kernels.vocab_parallel import StatisticsSpec
from tests.kernels.compiled import Code, compile_for_hopper, read
from tests.objectives.token.token_cases import CLOSED_FORM_LOSSES


def specialization(spec: StatisticsSpec) -> dict[str, bool | int]:
    """The compile-time arguments of the first pass."""
    K = triton.next_power_of_2(max(spec.top_k, 1))
    return {"MOMENTS": spec.moments, "HAS_C": spec.moments and spec.c > 0, "TOP_K": spec.top_k, "K": K}


SPECIALISATIONS = {  # one name for each: dft has cross-entropy's
    tuple(specialization(loss.statistics).items()): name for name, loss in reversed(CLOSED_FORM_LOSSES.items())
}
FIRST_PASS = {name: dict(constants) for constants, name in SPECIALISATIONS.items()}


def exponentials(MOMENTS: bool, HAS_C: bool, **_: int) -> int:
    """An exponential per temperature and column, one more per lane to rescale its maximum, and the logsigmoid's
    exponential and division; per thread 2 lanes of 8 columns in the loop, as many in the tail, and the lanes' merge at
    the end."""
    return 38 * (1 + MOMENTS) + 64 * HAS_C


REGISTERS = 72  # per thread, so that at least 7 blocks of 128 threads fit a multiprocessor's 65,536
WITH_TOP_K = 80  # 6 blocks: the largest logits stay in registers beside the sums
BACKWARD = {"plain": {"HAS_C": False}, "logsigmoid": {"HAS_C": True}}
ROUND = {"bf16": "F2FP.BF16.F32.PACK_AB", "fp16": "F2FP.F16.F32.PACK_AB"}  # to nearest even; .RZ would truncate


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def compiled(tmp_path: Path, kernel: object, dtype: str, *aligned: str, **constants: object) -> Code:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compile_for_hopper(kernel, dtype, aligned, constants))
    return read(path)


@pytest.mark.parametrize("name", FIRST_PASS)
def test_a_row_of_odd_length_is_read_once_in_16_byte_loads(tmp_path: Path, name: str) -> None:
    # An odd number of columns in rows whose stride is a multiple of 16: a view of a padded shard.
    code = compiled(tmp_path, fused._row_statistics, "bf16", "stride", **FIRST_PASS[name])
    assert code.spilled == code.count("LDL", "STL") == 0
    assert code.registers <= (WITH_TOP_K if FIRST_PASS[name]["TOP_K"] else REGISTERS)
    assert code.count("LDG.E.128") == 2  # each thread's part of a tile
    assert code.count("LDG.E.U16") == 17  # the tail, column by column, and the label's logit
    assert code.count("MUFU.EX2", "MUFU.RCP") <= exponentials(**FIRST_PASS[name])


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bf16") for name in FIRST_PASS), ("ce", "fp16"), ("gem-logsigmoid", "fp32")]
)
def test_a_row_of_even_length_is_read_in_16_byte_loads_alone(tmp_path: Path, name: str, dtype: str) -> None:
    code = compiled(tmp_path, fused._row_statistics, dtype, "stride", "V", **FIRST_PASS[name])
    assert code.spilled == code.count("LDL", "STL") == 0
    assert code.registers <= (WITH_TOP_K if FIRST_PASS[name]["TOP_K"] else REGISTERS)
    assert code.count("LDG.E.128") == 4  # a tile's and the tail's
    assert code.count("LDG.E.U16", "LDG.E") - code.count("LDG.E.128", "LDG.E.64") <= 2  # the label's logit, twice


@pytest.mark.parametrize("name", BACKWARD)
def test_the_gradient_of_a_row_of_odd_length_moves_16_bytes_at_a_time(tmp_path: Path, name: str) -> None:
    code = compiled(tmp_path, fused._write_gradient, "bf16", "stride", **BACKWARD[name])
    assert code.spilled == code.count("LDL", "STL") == 0
    assert code.registers <= REGISTERS
    assert code.count("LDG.E.128") == 2
    assert code.count("LDG.E.U16") == 16  # the tail
    assert code.count("STG.E.128") >= 4  # each thread's part of a tile of gradients, and of one of zeros
    assert code.count("STG.E.U16") == 32  # the tails of both
    assert code.count("F2F") == code.instructions[ROUND["bf16"]] > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", BACKWARD)
def test_the_gradient_of_a_row_of_even_length_moves_16_bytes_only(tmp_path: Path, name: str, dtype: str) -> None:
    code = compiled(tmp_path, fused._write_gradient, dtype, "stride", "V", **BACKWARD[name])
    assert code.spilled == code.count("LDL", "STL") == 0
    assert code.registers <= REGISTERS
    assert code.count("LDG.E.128") == 4
    assert code.count("STG") == code.count("STG.E.128") >= 8
    assert code.count("F2F") == code.instructions.get(ROUND.get(dtype, ""), 0)
