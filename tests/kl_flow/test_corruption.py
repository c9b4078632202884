"""KL-flow's denoiser input is correct, and a trained denoiser converges to the Bayes denoiser (K6).

Shapes: B samples, S positions of a row, N of a text, V tokens.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.corruption import SOURCE_STREAM, KLFlowOptions, draw_time, free_text, noisy_point
from megatron_sfr.kl_flow.simplex_path import Simplex, log_dirichlet
from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
from megatron_sfr.objectives.token.token_loss import vocab_parallel_loss
from tests import warm
from tests.kl_flow import simplex_program
from tests.kl_flow.bayes import bayes_logits
from tests.kl_flow.simplex_program import COLUMNS, SIZE

OPTIONS = KLFlowOptions()
PRIOR_V = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def test_free_positions_hold_points_of_the_path_and_given_positions_one_hots() -> None:
    sample_B, t_B = torch.tensor([5, 6]), torch.tensor([0.1, 0.7])
    text_BN, free_BN = torch.tensor([[0, 8, 3], [2, 2, 4]]), torch.tensor([[True, True, False], [False, True, True]])
    x_BNV = noisy_point(text_BN, free_BN, t_B, sample_B, Vocab(SIZE), 12, OPTIONS)
    assert (x_BNV[..., SIZE:] == 0).all()
    zero, place_N = torch.tensor(0), torch.arange(3)
    key = OPTIONS.noise_seed, sample_B[:, None], place_N, zero
    l_0 = log_dirichlet(*key, SIZE, stream=SOURCE_STREAM).double()
    one = torch.nn.functional.one_hot(text_BN, SIZE).double()
    t = t_B.double()[:, None, None]
    line = ((1 - t) * l_0 + t * (one * 0.99 + 0.01 / SIZE).log()).softmax(-1)
    expected = torch.where(free_BN[..., None], line, one)
    torch.testing.assert_close(x_BNV[..., :SIZE].double(), expected, rtol=1e-5, atol=1e-7)
    given_BN = ~free_BN
    assert torch.equal(x_BNV[..., :SIZE][given_BN], one[given_BN].float())  # exactly, without smoothing


def test_a_point_depends_only_on_its_sample_position_and_text() -> None:
    sample_B, t_B = torch.tensor([5, 6, 7]), torch.tensor([0.1, 0.2, 0.3])
    text_BN, free_BN = torch.arange(12).view(3, 4) % SIZE, torch.ones(3, 4, dtype=torch.bool)
    whole = noisy_point(text_BN, free_BN, t_B, sample_B, Vocab(SIZE), COLUMNS, OPTIONS)
    alone = noisy_point(text_BN[2:, :2], free_BN[2:, :2], t_B[2:], sample_B[2:], Vocab(SIZE), SIZE, OPTIONS)
    torch.testing.assert_close(whole[2:, :2, :SIZE], alone, rtol=1e-6, atol=0)
    assert len({*whole.amax(-1).flatten().tolist()}) == 12


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shards_of_real_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    warm.run(str(Path(simplex_program.__file__)), str(tmp_path), ranks=ranks, check=True)
    actual = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)], dim=-1)
    torch.testing.assert_close(actual, simplex_program.points(Vocab(SIZE), COLUMNS), rtol=1e-6, atol=1e-9)
    assert (actual[..., SIZE:] == 0).all()
    torch.testing.assert_close(actual.sum(-1), torch.ones(3, 6), rtol=1e-6, atol=0)


def test_times_are_uniform_up_to_t_max_and_the_samples_own() -> None:
    sample_B = torch.arange(20_000)
    t_B = draw_time(sample_B, OPTIONS)
    there = 0.3 * (torch.arange(20_000) + 0.5) / 20_000
    assert (t_B.sort().values - there).abs().max() < 0.3 * 0.012  # Kolmogorov-Smirnov
    assert torch.equal(draw_time(sample_B[7:9], OPTIONS), t_B[7:9])


def row(*masks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask [1, 12]: tokens 1, 2, ..., some of them supervised, and padding."""
    tokens = torch.arange(1, len(masks) + 1)
    row = torch.zeros(2, 12, dtype=torch.int64)
    row[0, : len(masks) - 1], row[1, : len(masks) - 1] = tokens[:-1], tokens[1:]
    mask_S = torch.zeros(12)
    mask_S[: len(masks) - 1] = torch.tensor(masks[1:])
    return row[:1], row[1:], mask_S[None]


def test_a_reply_is_free_and_followed_by_its_end_token() -> None:
    """So is the template's unsupervised token after the end."""
    text_BN, free_BN = free_text(*row(0, 0, 0, 1, 1, 1, 0), torch.tensor([3]), 11, OPTIONS)
    assert text_BN[0].tolist() == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6]
    assert free_BN[0].int().tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_one_of_several_replies_is_free() -> None:
    """The text before it is given, including earlier replies. The text after it is removed."""
    seen = {}
    for sample in range(60):
        text_BN, free_BN = free_text(*row(0, 1, 1, 0, 0, 1, 0, 1), torch.tensor([sample]), 10, OPTIONS)
        first = int(free_BN[0].int().argmax())
        assert free_BN[0, first:].all()
        seen[first] = text_BN[0].tolist()
    assert seen == {
        1: [1, 2, 3, 3, 3, 3, 3, 3, 3, 3],
        5: [1, 2, 3, 4, 5, 6, 6, 6, 6, 6],
        7: [1, 2, 3, 4, 5, 6, 7, 8, 8, 8],
    }


def test_documents_are_free_and_a_sequence_without_supervision_is_not() -> None:
    tokens_BS = torch.arange(24).view(2, 12)
    mask_BS = torch.tensor([[1.0], [0.0]]).expand(2, 12)
    text_BN, free_BN = free_text(tokens_BS, tokens_BS + 1, mask_BS, torch.tensor([1, 2]), 11, OPTIONS)
    assert torch.equal(text_BN, tokens_BS[:, :11])
    assert free_BN.all(-1).tolist() == [True, False]
    assert not free_BN[1].any()


@given(st.integers(0, 2**40), st.integers(1, 11), st.booleans())
def test_an_infilled_text_has_one_free_span_of_what_was_free(sample: int, prompt: int, whole: bool) -> None:
    masks = (0,) * prompt + (1,) * (12 - prompt)
    options = KLFlowOptions(infill=0.0 if whole else 1.0)
    text_BN, free_BN = free_text(*row(*masks), torch.tensor([sample]), 11, options)
    _, all_BN = free_text(*row(*masks), torch.tensor([sample]), 11, OPTIONS)
    assert text_BN[0].tolist() == list(range(1, 12))
    places = free_BN[0].nonzero()[:, 0]
    assert len(places) == (int(all_BN.sum()) if whole or prompt == 11 else places[-1] - places[0] + 1)
    assert (all_BN | ~free_BN).all()


@given(st.integers(0, 10**6), st.sampled_from([0, 2, 3, 9]), st.integers(1, 4), st.integers(0, 5))
def test_gaps_are_filled_up_by_end_tokens_and_push_the_rest_to_the_right(
    sample: int, prompt: int, gaps: int, padding: int
) -> None:
    n, end = 24, 99
    options = KLFlowOptions(infill=1.0, infill_gaps=gaps, infill_padding=padding)
    words = torch.arange(1, n + 1)[None]
    mask = torch.tensor([[0.0] * prompt + [1.0] * (n - prompt)])
    text_BN, free_BN = free_text(words[:, :-1], words[:, 1:], mask[:, 1:], torch.tensor([sample]), n, options, end)
    text, free = text_BN[0].tolist(), free_BN[0].tolist()
    assert [word for word in text if word != end] == words[0, : n - text.count(end)].tolist(), "nothing else moves"
    assert not any(free[:prompt])
    runs, start = [], None
    for i, is_free in enumerate([*free, False]):
        if is_free and start is None:
            start = i
        elif not is_free and start is not None:
            runs.append(text[start:i])
            start = None
    assert 1 <= len(runs) <= gaps
    assert text.count(end) == sum(run.count(end) for run in runs), "padding is free"
    if gaps == 1:
        (run,) = runs
        pads = run.count(end)
        assert pads <= padding
        assert run[len(run) - pads :] == [end] * pads
        assert pads < len(run)


def test_numbers_of_gaps_and_of_end_tokens_are_uniform() -> None:
    n, end, samples = 64, 99, torch.arange(4000)
    options = KLFlowOptions(infill=1.0, infill_gaps=1, infill_padding=3)
    words = torch.arange(1, n + 1).expand(len(samples), -1)
    ones = torch.ones(len(samples), n - 1)
    text_BN, free_BN = free_text(words[:, :-1], words[:, 1:], ones, samples, n, options, end)
    pads_B = (text_BN == end).sum(-1)
    shares = torch.bincount(pads_B, minlength=4).double() / len(samples)
    assert (shares - 0.25).abs().max() < 0.08  # padding beyond the end of the text is cut off
    several = KLFlowOptions(infill=1.0, infill_gaps=4)
    text_BN, free_BN = free_text(words[:, :-1], words[:, 1:], ones, samples, n, several)
    assert torch.equal(text_BN, words)
    starts_B = (free_BN & ~torch.nn.functional.pad(free_BN, (1, 0))[:, :-1]).sum(-1)
    shares = torch.bincount(starts_B, minlength=5)[1:5].double() / len(samples)
    assert (shares - 0.25).abs().max() < 0.06  # two gaps that touch count as one


def test_infilled_spans_are_uniform_over_lengths_and_positions() -> None:
    B, N = 60_000, 4
    tokens_BS = torch.arange(6).expand(B, 6)
    options = KLFlowOptions(infill=0.75)
    _, free_BN = free_text(tokens_BS, tokens_BS + 1, torch.ones(B, 6), torch.arange(B), N, options)
    spans, counts = free_BN.int().unique(dim=0, return_counts=True)
    actual = {tuple(span.tolist()): count / B for span, count in zip(spans, counts.tolist(), strict=True)}
    expected = {
        tuple(int(begin <= i < begin + length) for i in range(N)): 0.75 / N / (N - length + 1) + 0.25 * (length == N)
        for length in range(1, N + 1)
        for begin in range(N - length + 1)
    }
    assert actual == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("wrong", [{"smoothing": 0}, {"t_max": 0}, {"t_max": 1}, {"infill": 1.5}])
def test_options_outside_their_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KLFlowOptions(**wrong)


def toy_points(samples: Tensor, options: KLFlowOptions, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from the prior, and their points [B, V]."""
    drawn_B = torch.rand(len(samples), generator=torch.Generator().manual_seed(int(samples[0])))
    text_B = torch.searchsorted(PRIOR_V.cumsum(0), drawn_B).clamp(max=4)
    free_B1 = torch.ones(len(samples), 1, dtype=torch.bool)
    return text_B, noisy_point(text_B[:, None], free_B1, t_B, samples, Vocab(5), 5, options)[:, 0]


def cross_entropy(logits_BV: Tensor, text_B: Tensor) -> Tensor:
    return vocab_parallel_loss(logits_BV, text_B, CrossEntropy(), Vocab(5))[0]


def test_k6_the_bayes_denoiser_has_the_known_cross_entropy() -> None:
    """0.3465 nats at V = 5, t = 0.3; the prior's entropy at t = 0."""
    samples = torch.arange(200_000)
    for t, expected in ((0.3, 0.3465), (0.0, float(-(PRIOR_V * PRIOR_V.log()).sum()))):
        t_B = torch.full((len(samples),), t)
        text_B, x_BV = toy_points(samples, OPTIONS, t_B)
        actual = cross_entropy(bayes_logits(x_BV, t_B, PRIOR_V, Simplex(5)), text_B)
        assert float(actual.mean()) == pytest.approx(expected, abs=4 * float(actual.std()) / len(samples) ** 0.5)


def test_k6_a_trained_denoiser_converges_to_bayes_and_never_beats_it() -> None:
    """Both are evaluated on the same points; the mean difference is compared with its standard error."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 5))
    steps, batch = 1200, 1024
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def answer(x_BV: Tensor, t_B: Tensor) -> Tensor:
        return net(torch.cat([x_BV.clamp(min=1e-30).log(), 10 * t_B[:, None]], dim=-1))

    def examine(step: int) -> tuple[float, float]:
        """Mean excess of the denoiser's cross-entropy over Bayes' on fresh points, and its standard error."""
        samples = torch.arange(100_000) + (1 << 40) + step * 100_000
        t_B = draw_time(samples, OPTIONS)
        text_B, x_BV = toy_points(samples, OPTIONS, t_B)
        with torch.no_grad():
            own = cross_entropy(answer(x_BV, t_B), text_B)
        excess = own.double() - cross_entropy(bayes_logits(x_BV, t_B, PRIOR_V, Simplex(5)), text_B)
        return float(excess.mean()), float(excess.std()) / len(samples) ** 0.5

    actual = [examine(0)]
    for step in range(steps):
        samples = torch.arange(batch) + step * batch
        t_B = draw_time(samples, OPTIONS)
        text_B, x_BV = toy_points(samples, OPTIONS, t_B)
        cross_entropy(answer(x_BV, t_B), text_B).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step + 1 in (100, 400, steps):
            actual.append(examine(step + 1))
    assert all(excess > -3 * error for excess, error in actual)
    assert actual[0][0] > 0.3
    assert actual[-1][0] < 0.01
