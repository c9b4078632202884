"""vLLM's engine: refused in one line where it is missing; where it is, with a GPU, it says what transformers says."""

import importlib.util
from pathlib import Path

import pytest

from megatron_sfr import cli
from megatron_sfr.evaluation import sampling, vllm_sampling
from megatron_sfr.evaluation.prompts import ask
from megatron_sfr.evaluation.sampling import SamplingOptions

HAS_VLLM = importlib.util.find_spec("vllm") is not None
PROMPTS = [ask("Where to?", "poet"), ask("Why?", "robot")]


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_one_line_says_what_to_do(tiny_model: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["generate", "--model", str(tiny_model), "--prompt", "Why?", "--engine", "vllm"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "vLLM is not installed" in lines[0]


def test_a_reply_has_a_seed_of_its_own_that_depends_on_nothing_else() -> None:
    seeds = {vllm_sampling.seed_of(s, prompt, i) for s in (0, 1) for prompt in PROMPTS for i in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert vllm_sampling.seed_of(3, PROMPTS[0], 7) == vllm_sampling.seed_of(3, ask("Where to?", "poet"), 7)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM")
def test_greedy_replies_and_their_log_probabilities_are_those_of_transformers(tiny_model: Path) -> None:
    options = SamplingOptions(samples=1, temperature=0.0, max_new_tokens=8)
    served = vllm_sampling.load_model("tiny", tiny_model, dtype="float32")
    plain = sampling.load_model("tiny", tiny_model, dtype="float32")
    for (p, ours), (q, theirs) in zip(
        vllm_sampling.sample(served, PROMPTS, options), sampling.sample(plain, PROMPTS, options), strict=True
    ):
        assert (p, ours.tokens) == (q, theirs.tokens)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
