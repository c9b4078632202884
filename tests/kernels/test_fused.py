"""The fused kernels in Triton's interpreter, and `plain` in the same dtype, equal `plain` in float64.

Does not exercise the compiled code: test_compile.py inspects it, tests/gpu runs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

ROOT = Path(__file__).parents[2]
GROUPS = ("ignored rows", "odd vocabularies", "strided rows", "shards", "dtypes", "extremes", "ties")


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, dict[str, float]]]:
    """group -> case -> quantity -> its largest error in units of its tolerance."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("interpret.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


def test_the_program_compares_the_listed_settings(errors: dict) -> None:
    assert sorted(errors) == sorted(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_fused_equals_plain_in_float64(errors: dict, group: str) -> None:
    wrong = [
        f"{case}: {quantity} is off by {ratio:.3g} times what it may be"
        for case, quantities in errors[group].items()
        for quantity, ratio in quantities.items()
        if not ratio <= 1  # NaN too
    ]
    assert not wrong, "\n".join(wrong)
