"""`--sfr-preset reference` on data of `prepare --preset reference` against the authors' loss in reference.py.

The data are prepared, embedded by MiniLM and read as in a run. S positions, B conversations, H hidden size, d embedding
dimension.
"""

import argparse
import json
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.utils import Split
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.utils.data import default_collate
from transformers import AutoModel, AutoTokenizer

from megatron_sfr.config.option_flags import options
from megatron_sfr.config.settings import PARTS, PRESETS, Parser, to_flags
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.data.targets.embed import EmbedOptions, embed
from megatron_sfr.data.targets.encoder import encoder_path
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, draw_noise
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.training.auxiliary_loss import FlowTerm, TermOptions
from megatron_sfr.training.data.anchor_arrays import AnchorPlan, EntryOptions
from megatron_sfr.training.data.conversation_dataset import PreparedDataset, PreparedDatasetConfig
from megatron_sfr.training.data.provider import DataOptions
from tests.distributed.tiny import WORDS
from tests.objectives.sfr.reference import Row, authors_loss

H, d, SEQ_LENGTH = 24, 384, 512
# Words of each reply: a long one, several replies whose windows cross into the next one, and short ones.
REPLIES = ([290], [40, 60, 5], [6], [9], [150, 3])
LONG, SEVERAL, SHORT = 0, 1, 2


def preset(**changes: object) -> argparse.Namespace:
    parser = Parser()
    return parser.read(to_flags(PRESETS["reference"] | changes, parser))


def narrow(**changes: object) -> argparse.Namespace:
    """The preset with a head that is quick to compute in float64."""
    return preset(**{"sfr-head-width": 32, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared and embedded data; the chat template ends with the end token, so that the last input is supervised."""
    made, rng = tmp_path_factory.mktemp("reference"), random.Random(0)
    lines = []
    for replies in REPLIES:
        messages = []
        for words in replies:
            messages.append({"role": "user", "content": rng.choice(WORDS)})
            messages.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=words))})
        lines.append(json.dumps({"messages": messages}))
    (made / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = train_tokenizer([" ".join(WORDS)], 500)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(made / "tokenizer")
    cut = PrepareOptions(seq_length=SEQ_LENGTH, anchor_rule="reference", too_long="truncate")
    prepare([made / "rows.jsonl"], made / "data", made / "tokenizer", cut, progress=False)
    embed(made / "data", "minilm", EmbedOptions(max_length=512), progress=False)
    return made


def authors_rows(folder: Path) -> list[Row]:
    """ids and labels of each conversation, without the token that `prepare` appends."""
    rows, data = [], PreparedData.open(folder / "data")
    for i in range(len(data)):
        ids, mask = data[i].tokens, data[i].loss_mask
        end = np.flatnonzero(mask)[-1] + 1
        rows.append((ids[:end], np.where(mask[:end] == 1, ids[:end], -100)))
    return rows


@cache
def minilm() -> Callable[[str], Tensor]:
    """Mean pooling over all pieces of the encoder's tokenizer, length 1, fp16 as their encoder: [d]."""
    path = encoder_path("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()

    @cache
    @torch.no_grad()
    def encode(text: str) -> Tensor:
        pieces = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        mean = model(**pieces).last_hidden_state[0].double().mean(0)
        return (mean / mean.norm()).half().double()

    return encode


def make_head(args: argparse.Namespace) -> FlowHead:
    """The preset's head with all parameters random, including norms and the output layer."""
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=2, cuda_graph_modules=[])
    head = FlowHead(config, FlowHeadPlan(options(FlowHeadOptions, args), dim=d, gate_bins=1))
    g = torch.Generator().manual_seed(0)
    for p in head.net.parameters():
        with torch.no_grad():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return head


def make_batch(folder: Path, numbers: list[int], args: argparse.Namespace) -> dict[str, Tensor]:
    """The conversations as a microbatch of a run."""
    data = options(DataOptions, args)
    entries = EntryOptions(data.anchors, args.sfr_mean == "microbatch", data.fault_zero_targets)
    config = PreparedDatasetConfig(random_seed=1, sequence_length=SEQ_LENGTH, anchors=AnchorPlan("targets", entries))
    prepared = PreparedData.open(folder / "data")
    in_order = np.arange(len(prepared))
    dataset = PreparedDataset(prepared, str(folder / "data"), in_order, None, Split.valid, config)
    dataset.anchor_sizes = dataset.sizes(entries)
    return default_collate([dataset[i] for i in numbers])


def noise_of(args: argparse.Namespace, numbers: list[int], row: int, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """The noise that our loss draws for a row, in float64."""
    position = torch.from_numpy(positions)[None]
    sample = torch.full_like(position, numbers[row])
    z_0, tau = draw_noise(sample, position, torch.zeros_like(position), d, 0, options(SFROptions, args))
    assert z_0.shape[2] == 1  # one draw
    assert len(tau.unique()) == 1  # shared by the sequence
    return z_0[0, :, 0].double(), tau.flatten()[0].double()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("zero_targets", [False, True])
@pytest.mark.parametrize("numbers", [[LONG], [SEVERAL], [SHORT], [0, 1, 2, 3, 4]])
def test_loss_and_gradient_at_h_are_the_authors(folder: Path, numbers: list[int], zero_targets: bool) -> None:
    args = narrow(**{"sfr-fault-zero-targets": zero_targets})
    head, batch = make_head(args), make_batch(folder, numbers, args)
    kinds = (SFROptions, TargetOptions, GateOptions, FlowHeadOptions)
    term, g = FlowTerm(TermOptions(*(options(kind, args) for kind in kinds))), torch.Generator().manual_seed(2)
    h_SBH = torch.randn(SEQ_LENGTH, len(numbers), H, generator=g).requires_grad_()
    start = term.begin(head, step=0, first_average=0)
    actual = term(head, batch, h_SBH, start, detach=False, sharded=False, microbatches=1).objective
    actual = actual / batch["loss_mask"].sum()  # as the training loop divides
    (gradient,) = torch.autograd.grad(actual, h_SBH)

    weights = {name: p.detach().double() for name, p in head.net.named_parameters()}
    states = [h.detach().double().requires_grad_() for h in h_SBH.unbind(1)]
    decode = partial(load_tokenizer(str(folder / "tokenizer")).decode, skip_special_tokens=True)
    rows = [authors_rows(folder)[i] for i in numbers]
    expected = authors_loss(
        weights, rows, states, partial(noise_of, args, numbers), decode, minilm(), zero_targets=zero_targets
    )
    if numbers == [SHORT] and not zero_targets:
        assert actual == expected == 0
        return
    assert expected > 0.5
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    wanted = torch.stack(torch.autograd.grad(expected, states), dim=1)
    assert (gradient.double() - wanted).norm() < 1e-5 * wanted.norm()


def test_the_appended_token_makes_the_last_supervised_token_an_input(folder: Path) -> None:
    data = PreparedData.open(folder / "data")
    for i, replies in enumerate(REPLIES):
        tokens, mask, anchors = data[i].tokens, data[i].loss_mask, data[i].anchors
        assert (mask[-2:] == [1, 0]).all()
        assert tokens[-1] == tokens[-2]
        assert len(np.flatnonzero(np.diff(mask) == 1)) == len(replies)
        N = mask.sum()
        assert anchors.ordinal.tolist() == [t for t in range(0, N, 32) if N - t - 1 >= 16]
        assert (np.flatnonzero(mask)[anchors.ordinal] == anchors.position).all()


def test_the_preset_sets_the_authors_options() -> None:
    args = preset()
    for part in PARTS:
        options(part, args)
    assert options(DataOptions, args).anchors == "nearest"
    assert not options(DataOptions, args).fault_zero_targets
    assert options(TargetOptions, args).scale == "l2"
    assert options(SFROptions, args) == SFROptions(time_per="sequence", draws=1, mean="microbatch")
    assert options(ScheduleOptions, args) == ScheduleOptions(weight_on="loss")
    assert options(GateOptions, args) == GateOptions("dynamic", bins=1, baseline="current")
    head = FlowHeadOptions(time_scale=1.0, ema="smooth", ema_order="before_step")
    assert options(FlowHeadOptions, args) == head
