"""What FP8 cannot multiply is refused before a run starts; Transformer Engine would fail in the first step."""

import pytest

from megatron_sfr.config.settings import flag_parser
from megatron_sfr.config.validation import contradiction


@pytest.mark.parametrize(
    ("length", "flags", "multiple"),
    [
        (4096, "--fp8-format hybrid", None),
        (4088, "--fp8-format hybrid", 16),  # Transformer Engine's own check, of 8, would let it pass
        (4088, "", None),
        (4080, "--fp8-format hybrid --fp8-recipe mxfp8", 32),
        (4080, "--fp8-format hybrid --context-parallel-size 2", 32),
        (4080, "--fp8-format hybrid --tensor-model-parallel-size 8", None),
        (4080, "--fp8-format hybrid --tensor-model-parallel-size 8 --sequence-parallel", 64),
    ],
)
def test_fp8_needs_a_multiple_of_16_positions(length: int, flags: str, multiple: int | None) -> None:
    words = ["--train-data-path", "a", "--vocab-size", "9", "--calculate-per-token-loss", "--micro-batch-size", "1"]
    found = contradiction(flag_parser().read([*words, "--seq-length", str(length), *flags.split()]))
    assert found is None if multiple is None else f"need a multiple of {multiple} on these ranks" in str(found)
