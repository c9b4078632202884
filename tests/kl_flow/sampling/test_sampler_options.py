"""Validation of sampler options, and the number of steps of a sequence."""

import pytest
import torch

from megatron_sfr.kl_flow.sampling.sampler_options import DEFAULT_STEPS, Method, SamplerOptions

REFUSED = {
    "method": {"method": "euler"},
    "t_max": {"t_max": 1.0},
    "t_split": {"t_split": -0.1},
    "steps": {"steps": 0},
    "steps is 4096": {"steps": 4096},
    "steps is 2": {"steps": 2, "t_max": 0.9},
    "top_k": {"top_k": -1},
    "temperature": {"temperature": 0.0},
}


@pytest.mark.parametrize("words", REFUSED)
def test_invalid_options_are_refused_by_name(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplerOptions(**REFUSED[words])  # type: ignore[arg-type]


def test_conditional_texts_take_one_step_per_free_token() -> None:
    free_BS = torch.ones(4, 8, dtype=torch.bool)
    free_BS[0, :3], free_BS[1, :7], free_BS[2] = False, False, False
    assert SamplerOptions().steps_of(free_BS).tolist() == [5, 1, 1, DEFAULT_STEPS]
    assert SamplerOptions(t_max=0.9).steps_of(free_BS).tolist() == [5, 3, 3, DEFAULT_STEPS]
    assert SamplerOptions(steps=7).steps_of(free_BS).tolist() == [7] * 4


@pytest.mark.parametrize(
    ("method", "t_split", "steps", "draws"),
    [
        ("hybrid", 0.28, 12, False),  # its last step starts at t = 0.279
        ("hybrid", 0.28, 13, True),
        ("hybrid", 0.1, 2, True),
        ("sampling", 0.28, 1, True),
        ("basic", 0.0, 512, False),
    ],
)
def test_a_hybrid_of_few_steps_is_basic(method: Method, t_split: float, steps: int, draws: bool) -> None:
    assert SamplerOptions(method=method, t_split=t_split).draws_on_the_way(steps) is draws


def test_times_are_evenly_spaced_in_log_1_minus_t_and_end_at_t_max() -> None:
    chosen, steps_B = SamplerOptions(), torch.tensor([4, 16])
    assert chosen.time(0, steps_B).tolist() == [0, 0]
    assert chosen.time(2, steps_B).tolist() == pytest.approx([1 - 0.7**0.5, 1 - 0.7**0.125])
    assert float(chosen.time(4, steps_B)[0]) == pytest.approx(0.3)
