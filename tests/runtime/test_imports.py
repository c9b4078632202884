"""A rank imports Megatron without the packages that a training does not use."""

import subprocess
import sys

from megatron_sfr.runtime.backend import UNUSED

PROGRAM = f"""
import sys
from megatron_sfr.runtime import backend
backend.prepare(["--sfr-backend", "cpu"])
backend.import_megatron()
import megatron_sfr.config.build, megatron.training.training
assert not sys.modules.keys() & {set(UNUSED)}, "another module of upstream imports it too"
import transformers, wandb
assert transformers.__version__ and wandb.__version__
from megatron.core import timers
assert timers.wandb is None, "upstream no longer imports it there"
"""


def test_unused_packages_are_not_imported_but_can_be_later() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
