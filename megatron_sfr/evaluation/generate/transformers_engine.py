"""Samples replies from a Hugging Face model in batches, with random numbers keyed by the reply.

Token s of sample i for a prompt is drawn with one uniform number u(seed, prompt, i, s) through the inverse of the
model's cumulative distribution. So a reply does not depend on the rest of its batch, except for rounding, and all
models and temperatures share random numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sfr.data.chat.loss_mask import prompt_ids
from megatron_sfr.data.chat.template_options import AS_AT_INFERENCE, TemplateOptions
from megatron_sfr.data.chat.tokenizer import load_tokenizer
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions, in_order
from megatron_sfr.evaluation.generate.thinking import without_empty_thought
from megatron_sfr.runtime.devices import usable_device
from megatron_sfr.runtime.noise import uniform
from megatron_sfr.storage.jsonl import RecordError
from megatron_sfr.storage.model_folders import check_model_folder
from megatron_sfr.storage.user_files import loading, read_json_object, shown

STREAM = 2  # training uses 0 and 1 of the same generator
KEPT = 0.75  # finished sequences are dropped when fewer than this share continue, because dropping copies the cache
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Model:
    """A causal language model in eval mode, with its tokenizer and its end tokens."""

    name: str
    network: Any
    tokenizer: Any
    end_tokens: tuple[int, ...]


def load_model(name: str, folder: Path, *, device: str | None = None, dtype: str = "auto") -> Model:
    """Loads model and tokenizer of a Hugging Face folder without running its code. device None: a GPU if any."""
    check_model_folder(folder)
    place = usable_device(device)
    tokenizer = load_tokenizer(str(folder))
    network = load_network(folder, dtype, place)
    ends = end_tokens(network.generation_config.eos_token_id, tokenizer, folder)
    return Model(name, network, tokenizer, ends)


def load_network(folder: Path, dtype: str, device: str) -> Any:
    """Loads the causal language model of a Hugging Face folder in eval mode. Raises ValueError for damaged files."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if dtype not in DTYPES:
        raise ValueError(f"dtype {shown(dtype)} is unknown; choose {', '.join(DTYPES)}")
    quantization = read_json_object(folder / "config.json").get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "modelopt":
        raise ValueError(
            f"{folder} is quantized for inference engines ({quantization.get('quant_algo')}), which transformers does "
            "not load: use --engine vllm, or serve it and use --server"
        )
    disable_progress_bar()
    with loading(f"cannot load the model in {folder}", "files are damaged or do not belong together: export it again"):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).to(device).eval()
        with torch.inference_mode():  # a config.json with wrong types may fail only here
            network(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=True)
    return network


def end_tokens(named: object, tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """The end tokens of the generation config, else of the tokenizer. Raises ValueError if there are none."""
    ends = tokenizer.eos_token_id if named is None else named
    if ends is None:
        raise ValueError(f"{folder} names no end token; set eos_token_id in generation_config.json")
    listed = ends if isinstance(ends, list) else [ends]
    if not listed or not all(type(end) is int and end >= 0 for end in listed):
        raise ValueError(
            f"{folder}/generation_config.json: eos_token_id is {shown(ends)}; give the id of a token, or a list of them"
        )
    return tuple(listed)


def sample(
    model: Model, prompts: Sequence[Prompt], options: SamplingOptions, *, start: int = 0
) -> Iterator[tuple[int, Sampled]]:
    """Yields (index of the prompt, reply), `options.samples` for each prompt, batch by batch; short prompts come first.

    The first `start` replies, a number of complete batches, are skipped.
    """
    ids = [token_ids(model.tokenizer, prompt, options.template) for prompt in prompts]
    rows = in_order(ids, options.samples)
    for begin in range(start, len(rows), options.batch_size):
        batch = rows[begin : begin + options.batch_size]
        yield from zip((p for p, _ in batch), _sample_batch(model, prompts, ids, batch, options), strict=True)


def choose(logits_BV: Tensor, u_B: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Tokens [B] and their ln p at temperature 1 [B]: the inverse of the cumulative distribution at u in (0, 1)."""
    log_p_BV = logits_BV.float().log_softmax(dim=-1)
    if options.temperature == 0:
        token_B = log_p_BV.argmax(dim=-1)
    else:
        p_BV = _cut((log_p_BV / options.temperature).softmax(dim=-1), options).double()
        total_BV = p_BV.cumsum(dim=-1)
        # right=True skips tokens of probability 0; u < 1 keeps the last one with positive probability reachable.
        token_B = torch.searchsorted(total_BV, u_B.double()[:, None] * total_BV[:, -1:], right=True)[:, 0]
    if not bool(log_p_BV.amax(dim=-1).isfinite().all()):
        raise ValueError("the model's logits are not finite: its weights are damaged, or overflow in this --dtype")
    return token_B, log_p_BV.gather(-1, token_B[:, None])[:, 0]


def _cut(p_BV: Tensor, options: SamplingOptions) -> Tensor:
    """Probabilities with zeros outside the top_k most likely tokens, and outside the nucleus top_p of these tokens.

    The order is that of transformers and vLLM.
    """
    if not options.top_k and options.top_p == 1:
        return p_BV
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    if options.top_k:
        sorted_BV[:, options.top_k :] = 0
    total_BV = sorted_BV.double().cumsum(dim=-1)
    keep_BV = total_BV - sorted_BV < options.top_p * total_BV[:, -1:]
    return torch.zeros_like(p_BV).scatter(-1, order_BV, sorted_BV * keep_BV)


def token_ids(tokenizer: Any, prompt: Prompt, template: TemplateOptions = AS_AT_INFERENCE) -> list[int]:
    """The prompt rendered by the chat template, up to the start of the reply. Raises ValueError if it is empty."""
    try:
        ids = prompt_ids(prompt.turns(), tokenizer, template)
    except RecordError as error:
        raise ValueError(f"the prompt {shown(prompt.question)}: {error}") from error
    if not ids:
        raise ValueError(f"the prompt {shown(prompt.question)}: the chat template writes nothing for it; correct it")
    return ids


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """A reply's text, without special tokens and without an empty thought at its start."""
    return without_empty_thought(tokenizer.decode(tokens, skip_special_tokens=True))


@torch.inference_mode()
def _sample_batch(
    model: Model,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    rows: Sequence[tuple[int, int]],
    options: SamplingOptions,
) -> list[Sampled]:
    """Replies for pairs (prompt, sample): each prompt is processed once, then all sequences advance together."""
    device = model.network.device
    distinct = list(dict.fromkeys(p for p, _ in rows))
    row_B = torch.tensor([distinct.index(p) for p, _ in rows], device=device)
    state = _read([ids[p] for p in distinct], model)
    state.select(row_B)
    key_B = torch.tensor([prompts[p].key for p, _ in rows], device=device)
    draw_B = torch.tensor([s for _, s in rows], device=device)
    ends = torch.tensor(model.end_tokens, device=device)
    tokens: list[list[int]] = [[] for _ in rows]
    logprobs = [0.0] * len(rows)
    held_B = torch.arange(len(rows), device=device)
    live_B = torch.ones_like(held_B, dtype=torch.bool)
    for step in range(options.max_new_tokens):
        u_B = uniform(options.seed, key_B[held_B], torch.full_like(held_B, step), draw_B[held_B], stream=STREAM)
        token_B, logp_B = choose(state.logits_BV, u_B, options)
        drawn = (x[live_B].tolist() for x in (held_B, token_B, logp_B))
        for row, token, logp in zip(*drawn, strict=True):
            tokens[row].append(token)
            logprobs[row] += logp
        live_B = live_B & ~torch.isin(token_B, ends)
        if not live_B.any() or step + 1 == options.max_new_tokens:
            break
        if live_B.float().mean() <= KEPT:
            state.select(live_B.nonzero()[:, 0])
            held_B, token_B, live_B = held_B[live_B], token_B[live_B], live_B[live_B]
        state.advance(token_B, model)
    texts = [decoded(model.tokenizer, row) for row in tokens]
    return [
        Sampled(s, text, tuple(row), logprob, row[-1] in model.end_tokens)
        for (_, s), text, row, logprob in zip(rows, texts, tokens, logprobs, strict=True)
    ]


@dataclass
class _State:
    """Decoding state of each sequence: key-value cache, mask of positions that are not padding, next logits."""

    cache: Any
    mask_BL: Tensor
    logits_BV: Tensor

    def select(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order; a sequence may be repeated."""
        self.cache.reorder_cache(rows)  # Mamba layers have it too
        self.mask_BL, self.logits_BV = self.mask_BL[rows], self.logits_BV[rows]

    def advance(self, token_B: Tensor, model: Model) -> None:
        """Appends one token to each sequence."""
        self.mask_BL = torch.cat([self.mask_BL, self.mask_BL.new_ones(len(token_B), 1)], dim=1)
        place_B1 = self.mask_BL.sum(dim=1, keepdim=True) - 1
        self.logits_BV = _forward(model, token_B[:, None], place_B1, self.mask_BL, self.cache)


def _read(ids: Sequence[list[int]], model: Model) -> _State:
    """Processes prompts as one batch, padded on the left so that all end at the same position."""
    from transformers import DynamicCache

    length = max(map(len, ids))
    device = model.network.device
    tokens_BL = torch.tensor([[0] * (length - len(row)) + row for row in ids], device=device)
    mask_BL = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
    place_BL = (mask_BL.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.network.config)
    return _State(cache, mask_BL, _forward(model, tokens_BL, place_BL, mask_BL, cache))


def _forward(model: Model, tokens_BL: Tensor, place_BL: Tensor, mask_BL: Tensor, cache: Any) -> Tensor:
    """Logits [B, V] after the last token."""
    output = model.network(
        input_ids=tokens_BL,
        attention_mask=mask_BL,
        position_ids=place_BL,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
