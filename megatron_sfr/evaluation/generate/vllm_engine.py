"""Sampling with vLLM, for large models on GPUs: `generate --engine vllm`. vLLM is an optional dependency.

Log-probabilities are the same as those of the transformers engine: at temperature 1 without truncation, which vLLM
calls raw_logprobs. The random numbers are vLLM's, with one seed per reply: models do not share them token by token, and
the two engines draw different replies. Run with vLLM 0.32 on a CPU, not yet on a GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions, in_order, seed_of
from megatron_sfr.evaluation.generate.transformers_engine import decoded, end_tokens, token_ids
from megatron_sfr.storage.model_folders import check_model_folder
from megatron_sfr.storage.user_files import loading, shown

OURS = {  # engine arguments that replies depend on here
    "model": "--model",
    "tokenizer": "--model",
    "dtype": "--dtype",
    "trust_remote_code": "the command, which runs no code of a model's folder",
    "logprobs_mode": "the command",
}


@dataclass(frozen=True)
class Served:
    """A model loaded in vLLM, with its tokenizer and its end tokens."""

    name: str
    engine: Any
    tokenizer: Any
    end_tokens: tuple[int, ...]


def load_model(
    name: str,
    folder: Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    arguments: Mapping[str, Any] | None = None,
) -> Served:
    """Loads a Hugging Face folder without running its code.

    arguments: vLLM's engine arguments. Raises ValueError without vLLM, for unknown arguments, or if a device is given.
    """
    LLM = _vllm().LLM
    if device is not None:
        raise ValueError(f"--engine vllm chooses its device itself: leave --device {device} out")
    from transformers import AutoConfig, GenerationConfig

    check_model_folder(folder)
    check_arguments(arguments or {})
    tokenizer = load_tokenizer(str(folder))
    with loading(f"cannot load the model in {folder}", "its config.json or generation_config.json is damaged"):
        if (folder / "generation_config.json").is_file():
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
        else:
            ends = AutoConfig.from_pretrained(folder, trust_remote_code=False).eos_token_id
    given = {**(arguments or {}), "dtype": dtype, "trust_remote_code": False, "logprobs_mode": "raw_logprobs"}
    with loading(f"vLLM cannot load {folder}", "its messages above have the cause; correct --vllm-args, or the model"):
        engine = LLM(model=str(folder), **given)
    return Served(name, engine, tokenizer, end_tokens(ends, tokenizer, folder))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an engine argument that vLLM does not know, or that the command sets."""
    for name in arguments:
        if name in OURS:
            raise ValueError(f"--vllm-args: {name} is set by {OURS[name]}; leave it out")
    vllm = _vllm()
    known = {field.name for field in fields(vllm.EngineArgs)}
    for name in arguments:
        if name not in known:
            close = get_close_matches(name, known, n=3)
            hint = f"do you mean {', '.join(close)}?" if close else "vllm serve --help lists them, with - for _"
            raise ValueError(f"--vllm-args: vLLM {vllm.__version__} has no engine argument {shown(name)}; {hint}")


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            "--engine vllm: vLLM is not installed; install it in a separate environment (it pins torch), or leave "
            "--engine out"
        ) from error
    return vllm


def sample(
    model: Served, prompts: Sequence[Prompt], options: SamplingOptions, *, start: int = 0
) -> Iterator[tuple[int, Sampled]]:
    """Like transformers_engine.sample, in the same order; vLLM gets `batch_size` replies at a time."""
    from vllm import SamplingParams

    ids = [token_ids(model.tokenizer, prompt, options.template) for prompt in prompts]
    rows = in_order(ids, options.samples)
    for begin in range(start, len(rows), options.batch_size):
        batch = rows[begin : begin + options.batch_size]
        given = [
            SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k or -1,
                max_tokens=options.max_new_tokens,
                seed=seed_of(options.seed, prompts[p], s),
                stop_token_ids=list(model.end_tokens),
                logprobs=0,
            )
            for p, s in batch
        ]
        requests = [{"prompt_token_ids": ids[p]} for p, _ in batch]
        for (p, s), output in zip(batch, model.engine.generate(requests, given, use_tqdm=False), strict=True):
            reply = output.outputs[0]
            tokens = tuple(reply.token_ids)
            text = decoded(model.tokenizer, tokens)
            yield p, Sampled(s, text, tokens, reply.cumulative_logprob, tokens[-1] in model.end_tokens)
