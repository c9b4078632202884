"""ASFT in parallel layouts: the stored reference belongs to its tokens, and no layout changes a number.

The closed form against float64 is tested in tests/objectives/anchored, the store in
tests/evaluation/test_reference_probabilities.py.
"""

import shutil
from pathlib import Path

import pytest

from megatron_sfr.cli import main
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from tests.hf.models import save_model

from .launch import read_checkpoint, read_metrics
from .runs import Runs
from .settings import PP2, SP, TP2
from .test_layouts import MOMENT, difference
from .test_objectives import FIRST_FIT, check_equal_terms
from .tiny import write_recipe

pytestmark = pytest.mark.distributed
ASFT = ("--objective", "asft", "--asft-store", "eight")
LAYOUTS = {
    "single": (1, ()),
    "cp2-pp2": (4, ("--context-parallel-size", "2", *PP2)),
    "packed": (1, FIRST_FIT),
    "packed-tp2-pp2-sp": (4, (*FIRST_FIT, *TP2, *PP2, SP)),
}


def hf_models(runs: Runs) -> Path:
    """Two random Hugging Face models with the data's tokenizer; `eight` in the prepared folder is of `reference`."""

    def make(folder: Path) -> None:
        tokenizer = runs.prepared.parent / "tokenizer"
        loaded = load_tokenizer(str(tokenizer))
        ends = {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
        for name, spread in (("reference", 0.2), ("other", 0.02)):
            save_model(folder / name, initializer_range=spread, **ends)
            shutil.copytree(tokenizer, folder / name, dirs_exist_ok=True)
        store = str(runs.prepared / "eight")
        words = ["reference", "--data", str(runs.prepared), "--top-k", "8", "--device", "cpu", "--output", store]
        assert main([*words, "--model", str(folder / "reference")]) == 0

    return runs.once("asft models", make)


def trained(runs: Runs, start: str, layout: str) -> Path:
    """Three steps from one of the models."""
    model, (ranks, flags) = hf_models(runs) / start, LAYOUTS[layout]
    shape = {"qk_layernorm": False} | megatron_flags(read_config(model)) | {"seq_length": 80}
    recipe = runs.once("asft.yaml", lambda path: write_recipe(path, runs.prepared, **shape))
    given = ("--sfr-hf-load", str(model), "--sfr-measure-interval", "1")
    return runs.train(f"asft-{start}-{layout}", ranks, *ASFT, *given, *flags, recipe=recipe)


def test_the_first_step_is_at_the_reference_and_later_ones_leave_it(runs: Runs) -> None:
    """The trained model starts as the reference: a store that is shifted by one token has a KL far above 0 there."""
    rows = read_metrics(trained(runs, "reference", "packed"))
    assert rows[0]["asft loss"] > 0
    assert abs(rows[0]["asft kl"]) < 1e-5
    assert min(row["asft kl"] for row in rows[1:]) > 1e-4


@pytest.mark.parametrize(("one", "layout"), [("single", "cp2-pp2"), ("packed", "packed-tp2-pp2-sp")])
def test_layout_changes_no_number(runs: Runs, one: str, layout: str) -> None:
    """From another model: at the reference the KL's gradient is a difference of equal numbers, so only rounding.

    Packing pads conversations under context parallelism, so its steps have other conversations: not compared here.
    """
    both = trained(runs, "other", one), trained(runs, "other", layout)
    single, other = (read_checkpoint(run / "iter_0000003") for run in both)
    for prefix in (MOMENT, "decoder.", "embedding.", "output_layer.", "flow_head."):
        assert difference(single, other, prefix) < (2e-5, "")
    first, second = map(read_metrics, both)
    check_equal_terms(first, second)
    assert [row["asft kl"] for row in second] == pytest.approx([row["asft kl"] for row in first], rel=2e-5)
    assert first[0]["asft kl"] > 0.1
