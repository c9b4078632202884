"""The KL-flow example: its recipes are the trainer's, its gaps are whole lines of functions, and its scores are those
that texts made by hand are known to have."""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from examples.kl_flow import gaps, measure, scores
from examples.kl_flow.pieces import Folder
from examples.stdlib_cpt import corpus
from megatron_sfr.config.recipe import read_recipe
from megatron_sfr.config.settings import flag_parser, read_settings, to_flags
from megatron_sfr.evaluation.generate.transformers_engine import Model
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from tests import warm

FOLDER = Path(measure.__file__).parent
LENGTH = 48
MODULE = '''"""A module."""
import os

class Shelf:
    """Holds books."""

    def __init__(self, books):
        self.books = list(books)

    def first(self, default=None):
        """The first book."""
        if not self.books:
            return default
        return self.books[0]


def total(shelves):
    count = 0
    for shelf in shelves:
        count += len(shelf.books)
    return count
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the corpus's command writes of a part of the library."""
    folder = tmp_path_factory.mktemp("kl_flow")
    assert corpus.main(["--output", str(folder), "--megabytes", "1", "--vocabulary", "512"]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(made: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made / "model")


def recipe(name: str) -> dict[str, object]:
    return yaml.safe_load((FOLDER / name).read_text())


def resolved(*names: str) -> argparse.Namespace:
    settings = read_settings([word for name in names for word in ("--recipe", str(FOLDER / name))])
    return flag_parser().read(to_flags(dict(settings.recipe), flag_parser()))


def test_the_baseline_is_the_model_that_the_corpus_wrote(made: Path) -> None:
    flags = megatron_flags(read_config(made / "model"))
    base = recipe("autoregressive.yaml")
    assert {key: base.get(key) for key in flags} == flags
    assert base["vocab_size"] == 512


def test_the_denoiser_has_the_baselines_layers_rows_and_steps() -> None:
    base, more = recipe("autoregressive.yaml"), recipe("kl_flow.yaml")
    changed = {"save", "norm_epsilon", "embedding_init_method_std", "untie_embeddings_and_output_weights"}
    assert {key for key in more if not key.startswith("kl_flow_")} == changed | {"training_task"}
    assert more["save"] != base["save"]
    args = resolved("autoregressive.yaml", "kl_flow.yaml")
    assert (args.training_task, args.num_layers, args.train_iters) == ("kl-flow", 4, base["train_iters"])
    assert 0 < args.kl_flow_infill < 1


def test_the_dictionarys_rows_leave_room_for_the_time() -> None:
    args = resolved("autoregressive.yaml", "kl_flow.yaml", "dictionary.yaml")
    assert args.seq_length == 128 + 2  # `prepare --seq-length 128` allows rows of 129 tokens
    assert args.save == "runs/kl_flow/dictionary/kl_flow"


def test_upstream_accepts_the_recipe_for_a_gpu() -> None:
    done = warm.run("-m", "tests.house.validate_recipe", "1", str(FOLDER / "gpu.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["layers"] == [12]
    args = flag_parser().read(to_flags(read_recipe(FOLDER / "gpu.yaml"), flag_parser()))
    assert (args.training_task, args.optimizer, args.kl_flow_infill) == ("kl-flow", "muon", 0.25)


def test_a_gap_is_a_statements_lines_and_the_truth_in_it_is_python(tokenizer) -> None:
    found = gaps.gaps([MODULE], tokenizer, LENGTH, 1)
    for gap in found:
        assert len(gap.tokens) == LENGTH
        before, inside, after = (
            tokenizer.decode(part)
            for part in (gap.tokens[: gap.start], gap.tokens[gap.start : gap.stop], gap.tokens[gap.stop :])
        )
        assert before + inside + after in MODULE
        assert inside.startswith("\n")
        assert inside[1:].splitlines()[0] in MODULE.splitlines()
        assert tokenizer(before, add_special_tokens=False)["input_ids"][-4:] == list(gap.tokens[: gap.start])[-4:]
        assert gaps.is_python(tokenizer.decode(gap.filled(gap.tokens[gap.start : gap.stop])), gap.nested)
        assert tokenizer.decode(gap.tokens[gap.function :]).lstrip().startswith("def ")


def test_too_little_text_is_an_error(tokenizer) -> None:
    with pytest.raises(ValueError, match="ask for fewer gaps"):
        gaps.gaps([MODULE], tokenizer, LENGTH, 100)
    with pytest.raises(ValueError, match="ask for fewer texts"):
        gaps.text_rows([MODULE], tokenizer, LENGTH, 100)


@pytest.mark.parametrize(
    ("source", "nested", "valid"),
    [
        ("\ndef f():\n    return 1", False, True),
        ("\n    def f(self):\n        return 1", True, True),
        (
            "\n    def f(self):\n        x = 1\n    return x",
            True,
            False,
        ),  # a return outside of a function only compiles not
        ("\n    def f(self):\n        x = 1\n      return x", True, False),
        ("\n    def f(self):\n        return (1", True, False),
        ("\n    def f(self):\n        x = 1\ny = 2", True, False),
        ("\ndef f():\n", False, False),
        ("\ndef f():\n    return '\0'", False, False),
    ],
)
def test_python_is_what_its_compiler_takes(source: str, nested: bool, valid: bool) -> None:
    assert gaps.is_python(source, nested) == valid


def test_entropies_of_texts_that_are_counted_by_hand() -> None:
    flat, dull = [0, 1, 2, 3], [5, 5, 5, 5]
    assert scores.entropy_within([flat], 1).mean == pytest.approx(math.log(4))
    assert scores.entropy_within([flat, dull], 2).mean == pytest.approx(math.log(3) / 2)
    together = scores.entropy_over_all([flat, dull], 1)
    assert together.mean == pytest.approx(math.log(2) + math.log(4) / 2)
    assert together.low <= together.mean <= together.high
    assert scores.entropy_over_all([dull, dull], 2).mean == 0


def test_a_judge_that_knows_nothing_has_the_vocabularys_perplexity() -> None:
    network = torch.nn.Embedding(7, 7)
    torch.nn.init.zeros_(network.weight)

    class Judge(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=network(input_ids))

    nats = scores.losses(Model("judge", Judge(), None, (0,)), [[1, 2, 3], [3, 3, 3]], batch_size=1)
    np.testing.assert_allclose(nats, math.log(7), rtol=1e-6)
    assert scores.perplexity(nats).mean == pytest.approx(7)


def test_the_references_bound_what_a_writer_can_reach(tokenizer) -> None:
    asked = gaps.gaps([MODULE], tokenizer, LENGTH, 1)
    found = {name: measure.of_gaps(asked, rows, tokenizer) for name, rows in measure.references(asked).items()}
    assert found[measure.REAL]["valid"].mean == found[measure.REAL]["same"].mean == 1
    assert found["nothing"]["same"].mean == 0
    text = measure.markdown({"Gaps": found})
    assert "| real text | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] |" in text
    assert "| valid (n=1) | same (n=1) |" in text


def test_shuffled_rows_keep_the_tokens_and_their_entropy() -> None:
    rows = [list(range(10)), [0] * 10]
    mixed = measure.shuffled(rows)
    assert mixed != rows
    assert [len(row) for row in mixed] == [10, 10]
    assert scores.entropy_over_all(mixed, 1).mean == pytest.approx(scores.entropy_over_all(rows, 1).mean)


def test_a_piece_is_sampled_once_and_again_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    folder, calls = Folder(tmp_path), []

    def make(n: int) -> list[list[int]]:
        calls.append(n)
        return [[n]]

    for depends, n in (("a", 1), ("a", 2), ("b", 3)):
        rows = folder.piece("gaps of it", {"model": depends}, make, n)
        assert rows == [[calls[-1]]]
    assert calls == [1, 3]


def test_a_missing_judge_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(["--root", str(tmp_path)]) == 2
    assert "judge-hf is not a Hugging Face model" in capsys.readouterr().err
