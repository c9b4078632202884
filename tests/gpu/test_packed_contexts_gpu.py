"""Packed sequences that context-parallel ranks share, with Transformer Engine; the trainings need two CUDA devices.

tests/distributed/test_contexts.py has the same on gloo, with attention that gathers keys and values.
"""

import subprocess
from pathlib import Path

import pytest
import torch

from megatron_sfr.launch import command
from megatron_sfr.runtime.parallel import zigzag
from megatron_sfr.training.data.epochs import sequences_of
from megatron_sfr.training.data.packing import padding_multiple
from tests.distributed.launch import read_metrics
from tests.distributed.tiny import write_prepared, write_recipe

pytestmark = pytest.mark.gpu
BF16 = 2e-2
"""Relative difference of losses in bf16, as in tools/gpu_check."""
TEXTS = [8, 40, 16, 200, 8]  # multiples of 2 x 4
LENGTH = 200


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_positions_of_transformer_engine(ranks: int) -> None:
    pytest.importorskip(
        "transformer_engine.pytorch"
    )  # which loads its extension: a wheel has it in a folder of its own
    import transformer_engine_torch as tex

    bounds = torch.tensor([0, *TEXTS]).cumsum(0).to(torch.int32)
    for rank in range(ranks):
        expected = tex.thd_get_partitioned_indices(bounds.cuda(), sum(TEXTS), ranks, rank)
        assert torch.equal(zigzag(bounds, ranks, rank), expected.cpu().long())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that packs 26 conversations; beside it the weights to begin with, start/."""
    pytest.importorskip("transformer_engine.pytorch")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("packed")
    changes = {"kv_channels": 16, "seq_length": LENGTH, "max_position_embeddings": LENGTH, "micro_batch_size": 1}
    changes |= {"sfr_packing": "first_fit_decreasing", "bf16": True, "transformer_impl": "transformer_engine"}
    recipe = write_recipe(folder / "recipe.yaml", write_prepared(folder, rows=26), **changes)
    subprocess.run(command(recipe, 1, ["--save", str(folder / "start"), "--train-iters", "1", "--lr", "0"]), check=True)
    return recipe


@pytest.mark.parametrize("communication", ["p2p", "all_gather", "a2a"])
def test_two_ranks_that_share_packed_sequences_have_the_losses_of_one(
    recipe: Path, tmp_path: Path, communication: str
) -> None:
    """A step is an epoch: with padding, other conversations share a sequence."""
    runs = []
    for ranks in (1, 2):
        save, multiple = tmp_path / str(ranks), padding_multiple(ranks)
        size = sequences_of(recipe.parent / "prepared", LENGTH, packed=True, multiple=multiple)
        flags = ["--pretrained-checkpoint", str(recipe.parent / "start"), "--save", str(save)]
        flags += ["--context-parallel-size", str(ranks), "--cp-comm-type", communication]
        subprocess.run(command(recipe, ranks, [*flags, "--global-batch-size", str(size)]), check=True)
        runs.append(read_metrics(save))
    for one, two in zip(*runs, strict=True):
        for name in ("lm loss", "sfr loss", "grad-norm"):
            assert two[name] == pytest.approx(one[name], rel=BF16), name
