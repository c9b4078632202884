"""Sampling: draws follow the distribution, belong to their reply, and equal transformers' own generation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.cli.command_line import build_parser
from megatron_sfr.cli.model_args import sampling_options
from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.evaluation.generate.prompts import Prompt, ask
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions
from megatron_sfr.evaluation.generate.transformers_engine import (
    Model,
    choose,
    decoded,
    load_model,
    load_network,
    sample,
    token_ids,
)
from tests.hf.models import save_model

PROMPTS = [ask("Where to?", "poet"), ask("What should I give my sister as a birthday present?"), ask("Why?", "robot")]
OPTIONS = SamplingOptions(samples=5, max_new_tokens=12, batch_size=4)


def sample_all(model: Model, prompts: list[Prompt], options: SamplingOptions) -> list[list[Sampled]]:
    """The replies to each prompt, in the order of the prompts."""
    replies: list[list[Sampled]] = [[] for _ in prompts]
    for p, reply in sample(model, prompts, options):
        replies[p].append(reply)
    return replies


def ids_of(model: Model, prompt: Prompt) -> list[int]:
    text = model.tokenizer.apply_chat_template(prompt.turns(), tokenize=False, add_generation_prompt=True)
    return model.tokenizer(text)["input_ids"]


def test_a_reply_does_not_depend_on_its_batch(model: Model) -> None:
    together = sample_all(model, PROMPTS, replace(OPTIONS, batch_size=64))
    apart = [sample_all(model, [prompt], replace(OPTIONS, batch_size=1))[0] for prompt in PROMPTS]
    fewer = sample_all(model, PROMPTS[::-1], replace(OPTIONS, samples=3, batch_size=7))[::-1]
    assert [[r.text for r in replies] for replies in together] == [[r.text for r in replies] for replies in apart]
    assert [[r.text for r in replies[:3]] for replies in together] == [[r.text for r in replies] for replies in fewer]


def test_a_reply_of_a_model_with_mamba_layers_does_not_depend_on_its_batch(model: Model, tmp_path: Path) -> None:
    network = load_network(save_model(tmp_path, "NemotronHForCausalLM"), "auto", "cpu")
    mamba = Model("mamba", network, model.tokenizer, tuple(range(100)))  # every fifth token ends a reply
    together = sample_all(mamba, PROMPTS, replace(OPTIONS, batch_size=64))
    apart = [sample_all(mamba, [prompt], replace(OPTIONS, batch_size=1))[0] for prompt in PROMPTS]
    assert [[r.tokens for r in replies] for replies in together] == [[r.tokens for r in replies] for replies in apart]
    assert len({len(reply.tokens) for replies in together for reply in replies}) > 3


def test_same_command_same_replies_and_another_seed_others(model: Model) -> None:
    assert sample_all(model, PROMPTS, OPTIONS) == sample_all(model, PROMPTS, OPTIONS)
    other = sample_all(model, PROMPTS, replace(OPTIONS, seed=1))
    assert all(
        a.text != b.text for a, b in zip(*(r[0] for r in (sample_all(model, PROMPTS, OPTIONS), other)), strict=True)
    )


def test_samples_of_a_prompt_differ(model: Model) -> None:
    for replies in sample_all(model, PROMPTS, OPTIONS):
        assert [reply.sample for reply in replies] == list(range(OPTIONS.samples))
        assert len({reply.text for reply in replies}) > 1


def test_temperature_0_is_what_transformers_generates_greedily(model: Model) -> None:
    options = replace(OPTIONS, samples=1, temperature=0.0)
    for prompt, [reply] in zip(PROMPTS, sample_all(model, PROMPTS, options), strict=True):
        ids = ids_of(model, prompt)
        greedy = model.network.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=options.max_new_tokens,
        )[0, len(ids) :]
        assert reply.text == model.tokenizer.decode(greedy, skip_special_tokens=True)
        assert list(reply.tokens) == greedy.tolist()


def test_an_empty_thought_is_removed_from_a_reply(model: Model) -> None:
    for text in ("<think>\n\n</think>\n\nHello", "Hello"):
        assert decoded(model.tokenizer, model.tokenizer(text)["input_ids"]) == "Hello"


def test_logprob_is_that_of_the_whole_reply_at_temperature_1(model: Model) -> None:
    prompt = PROMPTS[1]
    [[reply]] = sample_all(model, [prompt], replace(OPTIONS, samples=1, temperature=0.7, top_k=20))
    ids = ids_of(model, prompt)
    logits = model.network(torch.tensor([[*ids, *reply.tokens]])).logits[0, len(ids) - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(reply.tokens)[:, None]).sum()
    assert reply.logprob == pytest.approx(expected.item(), rel=1e-4)


def test_replies_end_at_the_end_token(model: Model) -> None:
    replies = [
        reply for row in sample_all(model, PROMPTS, replace(OPTIONS, samples=64, max_new_tokens=40)) for reply in row
    ]
    assert {reply.finished for reply in replies} == {True, False}
    assert all(len(reply.tokens) == 40 for reply in replies if not reply.finished)
    assert all("<|im_end|>" not in reply.text for reply in replies)


@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 1.7]))
def test_draws_follow_the_tempered_distribution(seed: int, temperature: float) -> None:
    """The share of evenly spaced u that choose a token is its probability, to the spacing."""
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed)) * 3
    n = 4000
    u = (torch.arange(n) + 0.5) / n
    tokens, logp = choose(logits.expand(n, -1), u, SamplingOptions(temperature=temperature))
    share = torch.bincount(tokens, minlength=9) / n
    torch.testing.assert_close(share, (logits / temperature).softmax(-1), atol=2 / n, rtol=0)
    torch.testing.assert_close(logp, logits.log_softmax(-1)[tokens])


def test_top_k_and_top_p_keep_the_most_likely_tokens() -> None:
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    u = torch.arange(0.005, 1, 0.01)

    def kept(**options: float) -> set[int]:
        return set(choose(p.log().expand(len(u), -1), u, SamplingOptions(**options))[0].tolist())

    assert kept(top_k=2) == {1, 3}
    assert kept(top_p=0.6) == {1, 3}
    assert kept(top_p=0.7) == {1, 3, 4}
    assert kept(top_k=2, top_p=0.6) == {1}  # of the two, it has 0.4 / 0.65
    assert kept(top_k=3, top_p=0.6) == {1, 3}
    assert kept() == {0, 1, 2, 3, 4}


def test_tokens_of_probability_0_are_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(2, -1)
    tokens, _ = choose(logits, torch.tensor([2.0**-24, 1 - 2.0**-24]), SamplingOptions())
    assert tokens.tolist() == [1, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 0}, {"samples": 5000}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"batch_size": 0}],
)
def test_options_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"at least|at most"):
        SamplingOptions(**wrong)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Hugging Face model"):
        load_model("x", tmp_path)


def test_a_folder_for_engines_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match=r"quantized for inference engines \(FP8\), .*: use --engine vllm, or"):
        load_model("x", folder, device="cpu")


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["evaluate", "--data", "x", "--output", "x"]])
def test_the_template_options_of_the_command_line_write_the_prompt(model: Model, command: list[str]) -> None:
    given = ["--persona-as", "user", "--template-date", "2025-01-31", "--special-text", "literal"]
    args = build_parser().parse_args([*command, "--model", "m", *given, "--template-kwargs", "{}"])

    template = sampling_options(args).template

    assert template == TemplateOptions("user", "literal", {}, "2025-01-31")
    prompt = ask("Where to?", "poet", template.persona_as)
    by_hand = [{"role": "user", "content": "Answer in this persona: poet.\n\nWhere to?"}]
    text = model.tokenizer.apply_chat_template(by_hand, tokenize=False, add_generation_prompt=True)
    assert token_ids(model.tokenizer, prompt, template) == model.tokenizer(text)["input_ids"]
    assert token_ids(model.tokenizer, prompt) == ids_of(model, prompt)
