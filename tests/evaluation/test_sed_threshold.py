"""SED's properties S6 and S7 (arXiv 2602.07464): the calibrated threshold exempts the wanted share, in the loss too.

Shapes: T tokens, V vocabulary, n counted tokens.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sfr.cli import main
from megatron_sfr.config.objective import selected_loss
from megatron_sfr.config.recipe import read_recipe
from megatron_sfr.config.settings import Parser, to_flags
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.evaluation import conversation_logits
from megatron_sfr.evaluation.generate.transformers_engine import Model
from megatron_sfr.evaluation.sed_threshold import CalibrationOptions, threshold, top_masses
from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.objectives.token.sed import SED
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss

shares = st.floats(0.01, 0.99)


@torch.inference_mode()
def read_at_once(model: Model, chats: Path, samples: int, supervised: bool) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and labels [T] of the counted tokens, each conversation whole and on its own."""
    logits, found = [], []
    for sample in map(PreparedData.open(chats).__getitem__, range(samples)):
        tokens = torch.from_numpy(sample.tokens).long()
        wanted = torch.from_numpy(sample.loss_mask[1:]) > 0 if supervised else torch.ones(len(tokens) - 1).bool()
        logits.append(model.network(input_ids=tokens[None, :-1]).logits[0, wanted])
        found.append(tokens[1:][wanted])
    return torch.cat(logits), torch.cat(found)


def held_back(objective: SED, z_TV: Tensor, y_T: Tensor) -> int:
    """How many tokens an SED loss does not leave to cross-entropy."""
    loss_T, cross_entropy_T = vocab_parallel_loss(z_TV, y_T, objective, Vocab(z_TV.shape[1]))
    return int((loss_T != cross_entropy_T).sum())


def objective_of(recipe: Path) -> SED:
    """What a training run with this recipe minimizes."""
    parser = Parser()
    args = parser.read(to_flags(read_recipe(recipe), parser))
    _, loss = selected_loss(args)
    assert isinstance(loss, SED)
    return loss


@given(st.lists(st.floats(2**-13, 1.0, width=32), min_size=1, max_size=60, unique=True), shares)
def test_s6_without_ties_the_share_is_the_wanted_one_within_a_token(p: list[float], exempt: float) -> None:
    found = threshold(torch.tensor(p), exempt)
    assert found.n == len(p)
    assert abs(found.share - exempt) <= 1 / len(p)
    assert (torch.tensor(p) >= float(found.tau)).sum() == found.exempt


@given(st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=60), shares)
def test_s6_with_ties_no_threshold_comes_nearer(p: list[float], exempt: float) -> None:
    p_n = torch.tensor(p)
    found = threshold(p_n, exempt)
    possible = [(p_n >= tau).double().mean().item() for tau in (0.2, 0.3, 0.6, 0.8, 1.1)]
    assert abs(found.share - exempt) == pytest.approx(min(abs(share - exempt) for share in possible))
    assert (p_n >= float(found.tau)).sum() == found.exempt
    assert found.tied in {p.count(value) for value in p}


def test_s6_two_neighbours_in_fp32_are_distinguished() -> None:
    lower = np.float32(0.7311)
    p_n = torch.tensor(np.array([lower, np.nextafter(lower, np.float32(1))]))
    found = threshold(p_n, 0.5)
    assert (found.exempt, (p_n >= float(found.tau)).tolist()) == (1, [False, True])


def test_the_threshold_is_short_and_away_from_both_values() -> None:
    assert threshold(torch.tensor([0.1, 0.7299999, 0.7302, 0.9]), 0.5).tau == "0.7301"


@pytest.mark.parametrize("tokens", ["supervised", "all"])
def test_masses_are_those_of_the_complete_conversations(
    model: Model, chats: Path, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many conversations and positions are read at a time."""
    z_TV, _ = read_at_once(model, chats, 4, tokens == "supervised")
    whole_n = z_TV.softmax(-1).topk(5).values.sum(-1).sort().values
    for batch_size, positions in ((1, 10_000), (4, 10_000), (3, 90)):
        monkeypatch.setattr(conversation_logits, "LOGITS", positions * batch_size * z_TV.shape[1])
        wanted = CalibrationOptions(top_k=5, samples=4, batch_size=batch_size, tokens=tokens)
        found_n = top_masses(model, PreparedData.open(chats), wanted, progress=False)
        torch.testing.assert_close(found_n.sort().values, whole_n, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "k", "exempt"), [("supervised", 10, 0.7), ("supervised", 2, 0.3), ("all", 4, 0.5)])
def test_s6_s7_the_printed_recipe_holds_back_the_printed_share(
    tiny_model: Path, model: Model, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture, tokens, k, exempt
) -> None:
    """Both ways: the recipe carries k, and the loss that reads it holds back just the tokens that were counted so."""
    flags = ["--top-k", str(k), "--exempt", str(exempt), "--tokens", tokens, "--samples", "6", "--device", "cpu"]
    assert main(["calibrate-sed", "--model", str(tiny_model), "--data", str(chats), *flags]) == 0
    printed = capsys.readouterr()
    assert "calibrate" in printed.err  # the bar
    (tmp_path / "recipe.yaml").write_text(printed.out)
    assert read_recipe(tmp_path / "recipe.yaml").keys() == {"objective", "sed-top-k", "sed-threshold"}
    objective = objective_of(tmp_path / "recipe.yaml")
    assert objective.statistics.top_k == k
    z_TV, y_T = read_at_once(model, chats, 6, tokens == "supervised")
    n = len(y_T)
    count = n - held_back(objective, z_TV, y_T)
    assert f"# {n:,} " in printed.out
    assert f"exempts {count:,} of them: {count / n:.4f}" in printed.out
    assert abs(count / n - exempt) <= 1 / n

    (tmp_path / "recipe.yaml").write_text(printed.out.replace(f"sed_top_k: {k}", f"sed_top_k: {2 * k}"))
    assert held_back(objective_of(tmp_path / "recipe.yaml"), z_TV, y_T) < n - count


def test_ties_are_told(tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A model that answers 0 to everything gives all tokens the same mass."""
    even = shutil.copytree(tiny_model, tmp_path / "even")
    network = AutoModelForCausalLM.from_pretrained(tiny_model)
    network.model.norm.weight.data.zero_()
    network.save_pretrained(even)
    flags = ["--samples", "2", "--top-k", "2"]
    assert main(["calibrate-sed", "--model", str(even), "--data", str(chats), *flags]) == 0
    n = sum(int(PreparedData.open(chats)[i].loss_mask[1:].sum()) for i in (0, 1))
    assert f"# no threshold is nearer to 0.7: {n:,} tokens have the same P_2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "{model}/nowhere", "--data", "{data}"], "not a Hugging Face model"),
        (["--model", "{model}", "--data", "{data}/nowhere"], "does not exist; run: megatron-sfr prepare"),
        (["--model", "{model}", "--data", "{data}", "--exempt", "0"], "exempt is 0.0"),
        (["--model", "{model}", "--data", "{data}", "--exempt", "1"], "exempt is 1.0"),
        (["--model", "{model}", "--data", "{data}", "--samples", "0"], "samples is 0"),
        (["--model", "{model}", "--data", "{data}", "--top-k", "0"], "sed_top_k = 0"),
        (["--model", "{model}", "--data", "{data}", "--top-k", "129"], "sed_top_k = 129"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tiny_model: Path, chats: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["calibrate-sed", *(flag.format(model=tiny_model, data=chats) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_data_of_another_tokenizer_are_refused(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    train_tokenizer(["quite another text"], 300).save_pretrained(other)
    assert main(["calibrate-sed", "--model", str(other), "--data", str(chats)]) == 2
    error = capsys.readouterr().err
    assert f"{chats} was prepared with the tokenizer or chat template of {tiny_model}" in error
    assert f"--tokenizer {other}" in error


def test_more_probabilities_than_the_model_has_are_refused(model: Model, chats: Path) -> None:
    size = {"vocab_size": 50}
    small = AutoModelForCausalLM.from_config(type(model.network.config)(**model.network.config.to_dict() | size))
    with pytest.raises(ValueError, match="top_k is 100, and tiny has 50 tokens"):
        top_masses(replace(model, network=small), PreparedData.open(chats), CalibrationOptions(top_k=100))


def test_samples_without_a_supervised_token_are_refused(model: Model, chats: Path, tmp_path: Path) -> None:
    blank = PreparedData.open(shutil.copytree(chats, tmp_path / "blank"))
    mask = tmp_path / "blank" / "mask.bin"
    mask.write_bytes(bytes(mask.stat().st_size))
    with pytest.raises(ValueError, match=r"the first 12 conversations of .* have no supervised token"):
        top_masses(model, blank, CalibrationOptions(), progress=False)
