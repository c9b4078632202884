"""With an exact denoiser the samplers reproduce the language's statistics, each as far as theory predicts.

Shapes: B rows, S positions, V tokens.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.sampling.sampler_options import METHODS, SamplerOptions
from megatron_sfr.kl_flow.sampling.samplers import NOISE_STREAM, Canvas, Moment, sample
from megatron_sfr.kl_flow.sampling.vocab_shard import Shard
from megatron_sfr.kl_flow.simplex_path import Simplex, log_dirichlet
from tests.kl_flow.sampling.languages import MarkovLanguage, independent, language, total_variation

PRIOR = [0.4, 0.3, 0.15, 0.1, 0.05]
ROWS = 4000
# McDiarmid: total variation exceeds its mean by this much with probability 1/1000. The seed is fixed.
LUCK = math.sqrt(math.log(1000) / (2 * ROWS))


def blank(rows: int, length: int) -> Canvas:
    free_BS = torch.ones(rows, length, dtype=torch.bool)
    return Canvas(torch.zeros_like(free_BS, dtype=torch.int64), free_BS, torch.arange(rows))


def run(toy: MarkovLanguage, canvas: Canvas, options: SamplerOptions) -> Tensor:
    size = toy.simplex.size
    return sample(toy.denoise, canvas, Shard(Vocab(size), size), toy.simplex, options)


def options(method: str, steps: int | None, **changes: float) -> SamplerOptions:
    """A small vocabulary is decided late, so t_max is 0.6 here."""
    return SamplerOptions(method, steps, **{"t_max": 0.6, "t_split": 0.3} | changes)  # type: ignore[arg-type]


def mean_variation(p: Tensor) -> float:
    """Upper bound on the mean total variation between p and ROWS draws from it."""
    return float((p * (1 - p) / ROWS).sqrt().sum() / 2)


def pairs_of(x_BS: Tensor, position: int, size: int) -> Tensor:
    return torch.bincount(x_BS[:, position] * size + x_BS[:, position + 1], minlength=size * size).view(size, size)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_sampling_is_exact_for_one_position_at_any_number_of_steps(steps: int) -> None:
    """If x_t ~ p_t, then x1 ~ p(x1 | x_t) follows the prior and, with new noise, x_t' ~ p_t': every step is exact."""
    toy = independent(PRIOR)
    x_BS = run(toy, blank(20_000, 1), options("sampling", steps, final_top_k=0))
    assert chisquare(torch.bincount(x_BS[:, 0], minlength=5), 20_000 * toy.first_V).pvalue > 1e-3


def test_basic_is_exact_in_the_limit_of_small_steps() -> None:
    """Euler's error falls as h, at 4, 8 and 128 steps; the last one leaves only sampling noise."""
    toy = independent(PRIOR)
    errors = []
    for steps in (4, 8, 128):
        x_BS = run(toy, blank(20_000, 1), options("basic", steps, final_top_k=0))
        errors.append(total_variation(torch.bincount(x_BS[:, 0], minlength=5), toy.first_V))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_bigrams_follow_the_language(method: str) -> None:
    """All methods converge with the number of steps; independent neighbours would be far from these statistics."""
    toy = language()
    x_BS = run(toy, blank(ROWS, 6), options(method, 48))
    for position in (0, 2, 4):
        p_VV = toy.pairs(position)
        without = total_variation(p_VV.sum(dim=1)[:, None] * p_VV.sum(dim=0), p_VV)
        assert without > 1.5 * (mean_variation(p_VV) + LUCK) or position == 0  # the first pair is almost independent
        assert total_variation(pairs_of(x_BS, position, 6), p_VV) < mean_variation(p_VV) + LUCK


def test_sampling_with_few_steps_loses_dependencies_and_more_steps_restore_them() -> None:
    """Each step draws tokens independently; dependencies arise only over several steps."""
    toy = language()
    actual = [run(toy, blank(ROWS, 6), options("sampling", steps)) for steps in (2, 48)]
    few, many = (total_variation(pairs_of(x_BS, 2, 6), toy.pairs(2)) for x_BS in actual)
    assert few > 3 * many


def test_top_k_1_is_biased_at_any_number_of_steps() -> None:
    """Sampling with top_k = 1 omits rare tokens: the distribution is not the language's and has less entropy."""
    toy = language()
    p_VV = toy.pairs(2)
    x_BS = run(toy, blank(ROWS, 6), options("sampling", 48, top_k=1))
    actual = pairs_of(x_BS, 2, 6)
    assert total_variation(actual, p_VV) > 2 * (mean_variation(p_VV) + LUCK)
    assert torch.special.entr(actual / ROWS).sum() < torch.special.entr(p_VV).sum() - 0.1


@pytest.mark.parametrize("method", METHODS)
def test_an_infilled_token_follows_its_conditional_distribution(method: str) -> None:
    """Infilling a, ?, c: p(b | a, c) ~ move[a, b] move[b, c]."""
    toy = language()
    canvas = blank(ROWS, 3)
    canvas.tokens_BS[:] = torch.tensor([2, 0, 4])
    canvas.free_BS[:, [0, 2]] = False
    x_BS = run(toy, canvas, options(method, 64, final_top_k=0))
    p_V = toy.move_VV[2] * toy.move_VV[:, 4]
    p_V = p_V / p_V.sum()
    assert total_variation(torch.bincount(x_BS[:, 1], minlength=6), p_V) < mean_variation(p_V) + LUCK
    assert total_variation(torch.bincount(x_BS[:, 1], minlength=6), toy.pairs(0).sum(dim=0)) > 0.15


def test_k3_euler_towards_one_token_is_the_geodesic_to_order_h() -> None:
    simplex, size = Simplex(5), 5
    seen: dict[str, Tensor] = {}

    def certain(x_BSV: Tensor, t_B: Tensor) -> Tensor:
        seen["x"] = x_BSV.clone()
        logits_BSV = torch.full_like(x_BSV, -1e9)
        logits_BSV[..., 3] = 0
        return logits_BSV

    errors = []
    for steps in (20, 40, 80):
        chosen = options("basic", steps)
        sample(certain, blank(1, 7), Shard(Vocab(size), size), simplex, chosen)
        zero, place_S = torch.zeros(7, dtype=torch.int64), torch.arange(7)
        l_0_SV = log_dirichlet(0, zero, place_S, zero, size, stream=NOISE_STREAM)
        x_SV = simplex.between(l_0_SV, torch.full((7,), 3), torch.tensor(chosen.t_max)).softmax(dim=-1)
        errors.append(float((seen["x"][0] - x_SV).abs().max()))
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_k8_hybrid_is_sampling_or_basic_at_its_ends(top_k: int) -> None:
    toy, canvas = language(), blank(50, 6)
    for t_split, method in ((0.0, "sampling"), (0.6, "basic"), (1.0, "basic")):
        hybrid, other = (run(toy, canvas, options(m, 9, t_split=t_split, top_k=top_k)) for m in ("hybrid", method))
        assert torch.equal(hybrid, other)
    between = run(toy, canvas, options("hybrid", 9, top_k=top_k))
    for method in ("basic", "sampling"):
        assert not torch.equal(between, run(toy, canvas, options(method, 9, top_k=top_k)))


@given(st.data())
def test_k9_given_tokens_are_kept_and_clean_at_every_step(data: st.DataObject) -> None:
    toy = language()
    tokens_BS = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4))
    )
    draws = data.draw(st.lists(st.booleans(), min_size=tokens_BS.numel(), max_size=tokens_BS.numel()))
    free_BS = torch.tensor(draws).view_as(tokens_BS)
    steps = 3 if free_BS.all(dim=1).any() else None  # an entirely free sequence would take 512
    chosen = options(data.draw(st.sampled_from(METHODS)), steps)
    canvas = Canvas(tokens_BS, free_BS, torch.arange(len(tokens_BS)))
    order_B = chosen.steps_of(free_BS).argsort(descending=True, stable=True)
    clean_BSV = torch.nn.functional.one_hot(tokens_BS[order_B], 6).float()

    def watched(x_BSV: Tensor, t_B: Tensor) -> Tensor:
        given_BS = ~free_BS[order_B][: len(x_BSV)]
        assert torch.equal(x_BSV[given_BS], clean_BSV[: len(x_BSV)][given_BS])
        assert torch.allclose(x_BSV.sum(dim=-1), torch.ones(()))
        return toy.denoise(x_BSV, t_B)

    x_BS = sample(watched, canvas, Shard(Vocab(6), 6), toy.simplex, chosen)
    assert torch.equal(x_BS[~free_BS], tokens_BS[~free_BS])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_sequence_does_not_depend_on_its_batch_or_order(method: str, top_k: int) -> None:
    """Sequences with different numbers of free positions, and so of steps."""
    toy, canvas = language(), blank(12, 6)
    canvas.tokens_BS[:] = 3
    for row in range(12):
        canvas.free_BS[row, : row % 5] = False
    canvas.free_BS[9:, 0] = False  # an entirely free sequence would take 512 steps
    canvas.free_BS[[0, 5], 5] = False
    chosen = options(method, None, top_k=top_k)
    together = run(toy, canvas, chosen)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(toy, canvas[order], chosen), together[order])
    for row in (0, 4, 8):
        assert torch.equal(run(toy, canvas[torch.tensor([row])], chosen)[0], together[row])


def test_samples_differ_only_by_number_and_seed() -> None:
    toy, canvas = language(), blank(40, 6)
    first = run(toy, canvas, options("sampling", 5))
    assert torch.equal(first, run(toy, canvas, options("sampling", 5)))
    assert not torch.equal(first, run(toy, canvas, options("sampling", 5, seed=1)))
    assert len(first.unique(dim=0)) > 30


def test_watch_is_called_at_each_step_with_the_times_of_the_grid() -> None:
    toy = language()
    seen: list[Moment] = []
    size = toy.simplex.size
    chosen = options("hybrid", 4)
    sample(toy.denoise, blank(2, 3), Shard(Vocab(size), size), toy.simplex, chosen, seen.append)
    assert [(moment.number, moment.steps) for moment in seen] == [(n, 4) for n in range(5)]
    assert [moment.t for moment in seen] == pytest.approx([1 - 0.4 ** (n / 4) for n in range(5)])
    assert seen[0].logits_FW.shape == (6, 6)
