"""vLLM's engine: refused in one line if it is not installed; otherwise its replies equal those of transformers."""

import importlib.util
from pathlib import Path

import pytest
import torch

from megatron_sfr import cli
from megatron_sfr.evaluation.generate import transformers_engine, vllm_engine
from megatron_sfr.evaluation.generate.prompts import ask
from megatron_sfr.evaluation.generate.sampling import SamplingOptions, seed_of

HAS_VLLM = importlib.util.find_spec("vllm") is not None
PROMPTS = [ask("Where to?", "poet"), ask("Why?", "robot")]


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_one_line_says_what_to_do(tiny_model: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["generate", "--model", str(tiny_model), "--prompt", "Why?", "--engine", "vllm"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "vLLM is not installed" in lines[0]


def test_a_reply_has_a_separate_seed_that_depends_on_nothing_else() -> None:
    seeds = {seed_of(s, prompt, i) for s in (0, 1) for prompt in PROMPTS for i in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(3, PROMPTS[0], 7) == seed_of(3, ask("Where to?", "poet"), 7)


@pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM; its build for CPUs will do")
def test_replies_are_repeatable_and_their_log_probabilities_are_those_of_transformers(tiny_model: Path) -> None:
    served = vllm_engine.load_model("tiny", tiny_model, dtype="float32")
    plain = transformers_engine.load_model("tiny", tiny_model, dtype="float32", device="cpu")
    greedy = SamplingOptions(samples=1, temperature=0.0, max_new_tokens=8)
    for (p, ours), (q, theirs) in zip(
        vllm_engine.sample(served, PROMPTS, greedy), transformers_engine.sample(plain, PROMPTS, greedy), strict=True
    ):
        assert (p, ours.tokens, ours.finished) == (q, theirs.tokens, theirs.finished)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    warm = SamplingOptions(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=12, seed=3, batch_size=4)
    drawn = list(vllm_engine.sample(served, PROMPTS, warm))
    assert {(p, reply.sample) for p, reply in drawn} == {(p, s) for p in range(2) for s in range(3)}
    assert list(vllm_engine.sample(served, PROMPTS, warm, start=2)) == drawn[2:]
    for p, reply in drawn:  # at temperature 1, nothing cut off
        ids = torch.tensor([[*transformers_engine.token_ids(plain.tokenizer, PROMPTS[p]), *reply.tokens]])
        with torch.inference_mode():
            logp_SV = plain.network(ids).logits[0].log_softmax(dim=-1)[-len(reply.tokens) - 1 : -1]
        assert reply.logprob == pytest.approx(
            float(logp_SV.gather(1, ids[0, -len(reply.tokens) :, None]).sum()), abs=1e-3
        )


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    assert cli.main(["generate", "--model", str(folder), "--prompt", "Why?", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("megatron-sfr generate: error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size goes with --engine vllm: leave it out"),
        (["--vllm-args", '{"max_model_len": 64}'], "--vllm-args goes with --engine vllm: leave it out"),
        (["--engine", "vllm", "--tensor-parallel-size", "0"], "--tensor-parallel-size 0: give at least 1"),
        (["--engine", "vllm", "--vllm-args", "{"], "--vllm-args '{': not JSON"),
        (["--engine", "vllm", "--vllm-args", "[]"], "--vllm-args '[]': write a JSON object"),
        (["--engine", "vllm", "--vllm-args", '{"tensor_parallel_size": 2}'], "by --tensor-parallel-size"),
        (["--engine", "vllm", "--vllm-args", '{"dtype": "half"}'], "dtype is set by --dtype; leave it out"),
        (["--engine", "vllm", "--vllm-args", '{"trust_remote_code": true}'], "runs no code of a model's folder"),
    ],
)
def test_engine_arguments_that_have_no_effect_are_refused(
    tiny_model: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in refused(capsys, tiny_model, *flags)


@pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM; its build for CPUs will do")
def test_vllm_refuses_an_unknown_engine_argument_and_takes_a_known_one(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = '{"gpu_memory_utilisation": 0.8}'
    line = refused(capsys, tiny_model, "--engine", "vllm", "--vllm-args", wrong)
    assert "has no engine argument 'gpu_memory_utilisation'; do you mean gpu_memory_utilization" in line
    served = vllm_engine.load_model("tiny", tiny_model, dtype="float32", arguments={"max_model_len": 64})
    assert served.engine.llm_engine.model_config.max_model_len == 64
