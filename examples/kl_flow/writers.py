"""The two kinds of models that are compared: a denoiser of KL-flow, and an autoregressive model of its size."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from megatron_sfr.evaluation.generate.transformers_engine import Model
from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.checkpoint import load_denoiser
from megatron_sfr.kl_flow.flow_generate import SPLIT
from megatron_sfr.kl_flow.model import denoise, time_positions
from megatron_sfr.kl_flow.sampling import requests
from megatron_sfr.kl_flow.sampling.sampler_options import Method, SamplerOptions
from megatron_sfr.kl_flow.sampling.samplers import sample
from megatron_sfr.kl_flow.sampling.vocab_shard import Shard
from megatron_sfr.kl_flow.simplex_path import Simplex
from megatron_sfr.runtime.backend import device

from .gaps import Gap

Rows = list[list[int]]


class Denoiser:
    """A checkpoint of KL-flow."""

    def __init__(self, checkpoint: Path, backend: Literal["cpu", "cuda"], batch_size: int) -> None:
        model, run = load_denoiser(checkpoint, backend)
        vocab = Vocab(run.vocab_size)
        self.call, self.shard = partial(denoise, model, vocab=vocab), Shard(vocab, run.padded_vocab_size)
        self.simplex, self.t_max = Simplex(run.vocab_size, run.kl_flow_smoothing), run.kl_flow_t_max
        self.length, self.batch_size = run.seq_length - time_positions(model), batch_size
        self.parameters = sum(p.numel() for p in model.parameters())

    def texts(self, count: int, method: Method, steps: int) -> Rows:
        return self._write([requests.blank(self.length)], count, method, steps)

    def fill(self, gaps: Sequence[Gap], method: Method, steps: int) -> Rows:
        """The tokens that fill each gap."""
        parts = [(g.tokens[: g.start], requests.Gap(0, g.stop - g.start), g.tokens[g.stop :]) for g in gaps]
        rows = self._write([requests.infill(each, {}) for each in parts], 1, method, steps)
        return [row[g.start : g.stop] for row, g in zip(rows, gaps, strict=True)]

    def _write(self, asked: Sequence[requests.Request], samples: int, method: Method, steps: int) -> Rows:
        options = SamplerOptions(method, steps, t_max=self.t_max, t_split=SPLIT * self.t_max)
        rows: Rows = []
        for batch in requests.batches(asked, samples, self.batch_size):
            area = requests.canvas(batch, device())
            rows += sample(self.call, area, self.shard, self.simplex, options).tolist()
        return rows


class Autoregressive:
    """A Hugging Face model that writes from left to right."""

    def __init__(self, model: Model, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size

    def texts(self, starts: Sequence[int], length: int, temperature: float) -> Rows:
        """Texts of `length` tokens, which begin with the given tokens: the model has no start token."""
        return [
            [first, *rest]
            for first, rest in zip(
                starts, self._continue([[t] for t in starts], [length - 1] * len(starts), temperature), strict=True
            )
        ]

    def fill(self, gaps: Sequence[Gap], temperature: float) -> Rows:
        """A continuation of the tokens before each gap, of the gap's length. The tokens after it are not used."""
        prefixes = [list(g.tokens[: g.start]) for g in gaps]
        return self._continue(prefixes, [g.stop - g.start for g in gaps], temperature)

    @torch.inference_mode()
    def _continue(self, prefixes: Sequence[list[int]], lengths: Sequence[int], temperature: float) -> Rows:
        """Samples from the whole vocabulary. End tokens do not end a text."""
        torch.manual_seed(0)
        network, rows = self.model.network, Rows()
        for i in range(0, len(prefixes), self.batch_size):
            some, wanted = prefixes[i : i + self.batch_size], lengths[i : i + self.batch_size]
            width = max(map(len, some))
            tokens_BL = torch.tensor([[0] * (width - len(row)) + row for row in some], device=network.device)
            mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some], device=network.device)
            out_BL = network.generate(
                tokens_BL,
                attention_mask=mask_BL,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(wanted),
                eos_token_id=network.config.vocab_size,  # none
                pad_token_id=0,
            )
            rows += [row[:n] for row, n in zip(out_BL[:, width:].tolist(), wanted, strict=True)]
        return rows
