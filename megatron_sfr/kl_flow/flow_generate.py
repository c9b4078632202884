"""What `megatron-sfr flow-generate` runs on each rank: samples of a KL-flow checkpoint, as JSONL.

python -m megatron_sfr.kl_flow.flow_generate JOB.json, alone or under torchrun, whose ranks then share the vocabulary.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from megatron_sfr.data.chat.loss_mask import prompt_ids
from megatron_sfr.data.chat.tokenizer import load_tokenizer, tokenizer_sha256
from megatron_sfr.evaluation.generate.prompts import Prompt, ask, read_prompts
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.sampling.requests import (
    Request,
    SampleSpec,
    batches,
    blank,
    canvas,
    read_gaps,
    reply,
    whole_batches,
)
from megatron_sfr.kl_flow.sampling.sampler_options import Method, SamplerOptions
from megatron_sfr.kl_flow.sampling.samplers import Denoiser, sample
from megatron_sfr.kl_flow.sampling.trajectory import Recorder
from megatron_sfr.kl_flow.sampling.vocab_shard import Shard
from megatron_sfr.kl_flow.simplex_path import Simplex
from megatron_sfr.runtime import lifetime
from megatron_sfr.runtime.backend import Name, choose, prepare
from megatron_sfr.storage.provenance import contents_of
from megatron_sfr.storage.resumable import is_finished, resumable
from megatron_sfr.storage.user_files import shown

ERROR = "megatron-sfr flow-generate: error:"
SPLIT = 0.28 / 0.3  # of t_max, where the paper's code turns from the differential equation to draws


@dataclass(frozen=True)
class Job:
    """The command's arguments."""

    checkpoint: str
    tokenizer: str
    output: str
    nproc: int
    backend: Name
    prompt: str | None
    persona: str | None
    prompts: str | None
    infill: str | None
    samples: int
    length: int | None
    max_new_tokens: int | None
    batch_size: int
    method: Method
    steps: int | None
    top_k: int
    final_top_k: int
    temperature: float
    t_split: float | None
    seed: int
    film: str | None
    """Where the film's frames are written."""


@dataclass(frozen=True)
class Plan:
    """A job whose files were read and found to fit together."""

    folder: Path
    tokenizer: Any
    requests: list[Request]
    options: SamplerOptions
    simplex: Simplex


def plan(job: Job) -> Plan:
    """Reads all but the weights. ValueError in one line for what does not fit."""
    folder = find_checkpoint(Path(job.checkpoint))
    run = Checkpoint(folder).arguments()
    if run.get("training_task") != "kl-flow":
        raise ValueError(f"{folder} holds no KL-flow model: train one with --training-task kl-flow")
    for name in ("samples", "batch_size", "nproc", "length", "max_new_tokens"):
        if (given := getattr(job, name)) is not None and given < 1:
            raise ValueError(f"{name} is {given}; give at least 1")
    if wrong := [n for n in ("num_attention_heads", "num_query_groups") if (run.get(n) or job.nproc) % job.nproc]:
        raise ValueError(f"--nproc {job.nproc} does not divide the model's {wrong[0]} of {run[wrong[0]]}")
    choose(job.backend)
    tokenizer = load_tokenizer(job.tokenizer, chat=bool(job.prompt or job.prompts))
    if len(tokenizer) > run["vocab_size"]:
        raise ValueError(
            f"the tokenizer at {job.tokenizer} has {len(tokenizer)} tokens, the model {run['vocab_size']}; "
            "give the one that prepared the training data"
        )
    t_max = run["kl_flow_t_max"]
    options = SamplerOptions(
        method=job.method,
        steps=job.steps,
        top_k=job.top_k,
        temperature=job.temperature,
        final_top_k=job.final_top_k,
        t_max=t_max,
        t_split=SPLIT * t_max if job.t_split is None else job.t_split,
        seed=job.seed,
    )
    requests = _requests(job, tokenizer, _positions(run))
    if job.film is not None and len(requests[0].gaps) > 1:
        raise ValueError("--film shows a text with one gap: leave it out, or let the first record have one")
    return Plan(folder, tokenizer, requests, options, Simplex(run["vocab_size"], run["kl_flow_smoothing"]))


def notice(made: Plan) -> str | None:
    """A line for the user if the hybrid method makes so few steps that it equals the basic one; else None."""
    options = made.options
    steps = {n for request in made.requests for n in _steps([SampleSpec(request, 0)], options)}
    if options.method != "hybrid" or options.t_split >= options.t_max or any(map(options.draws_on_the_way, steps)):
        return None
    return (
        f"--method hybrid with {max(steps)} steps is basic: none begins at t_split = {options.t_split:g} or later; "
        "take more steps or an earlier --t-split"
    )


def _positions(run: Mapping[str, Any]) -> int:
    """The longest text in tokens: the time may take the first of the seq_length positions."""
    return int(run["seq_length"]) - (run["kl_flow_time"] == "token")


def _requests(job: Job, tokenizer: Any, positions: int) -> list[Request]:
    if job.infill is not None:
        return read_gaps(Path(job.infill), tokenizer, positions)
    if job.prompt is not None or job.prompts is not None:
        asked = read_prompts(Path(job.prompts)) if job.prompts else [ask(job.prompt or "", job.persona)]
        return [_reply_to(prompt, tokenizer, positions, job.max_new_tokens) for prompt in asked]
    if (job.length or 0) > positions:
        raise ValueError(f"--length {job.length} is more than the {positions} positions that the model was trained on")
    return [blank(job.length or positions)]


def _reply_to(prompt: Prompt, tokenizer: Any, positions: int, longest: int | None) -> Request:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end token; set eos_token in its tokenizer_config.json")
    told = {"prompt": prompt.shared, "question": prompt.question, "persona": prompt.persona}
    try:
        ids = prompt_ids(prompt.turns(), tokenizer)
        return reply(ids, positions, longest, tokenizer.eos_token_id, prompt.key, told)
    except ValueError as error:
        raise ValueError(f"the prompt {shown(prompt.question)}: {error}") from error


def record(spec: SampleSpec, tokens: Sequence[int], steps: int, made: Plan) -> dict[str, object]:
    """The output record of a sample."""
    found, finished = spec.request.found(tokens)
    text, told = made.tokenizer.decode(found, skip_special_tokens=True), spec.request.told
    gaps: dict[str, object] = {}
    if "parts" in told:  # the whole text, and each gap's
        fills = [made.tokenizer.decode(gap.found(tokens)[0], skip_special_tokens=True) for gap in spec.request.gaps]
        left = iter(fills)
        text, gaps = "".join(part if isinstance(part, str) else next(left) for part in told["parts"]), {"gaps": fills}
    return {
        **told,
        "sample": spec.sample,
        "text": text,
        **gaps,
        "tokens": len(found),
        "token_ids": found,
        "finished": finished,
        "method": made.options.method,
        "steps": steps,
        "seed": made.options.seed,
    }


def generate(job: Job, made: Plan, screen: IO[str]) -> None:
    """Samples every request, on every rank; the first one writes the output and shows a bar."""
    from megatron_sfr.runtime.backend import device
    from megatron_sfr.runtime.parallel import broadcast_over_tensor, tensor_rank

    denoiser, shard = _denoiser(job, made)
    found = batches(made.requests, job.samples, job.batch_size)
    first = tensor_rank() == 0
    with _output(job, made, found, first) as (file, done_here):
        done = int(broadcast_over_tensor(torch.tensor([done_here], device=device())))
        left = [batch for batch, end in zip(found, accumulate(map(len, found)), strict=True) if end > done]
        total = sum(max(_steps(batch, made.options)) for batch in left)
        with tqdm(total=total, unit="step", file=screen, disable=not first, dynamic_ncols=True) as bar:
            for batch in left:
                bar.set_description(f"sample {done + 1}")
                area = canvas(batch, device())
                tokens_BS = sample(
                    denoiser, area, shard, made.simplex, made.options, lambda moment: bar.update(moment.number > 0)
                )
                for sampled in zip(batch, tokens_BS.tolist(), _steps(batch, made.options), strict=True):
                    file.write(json.dumps(record(*sampled, made), ensure_ascii=False) + "\n")
                done += len(batch)
    if job.film is not None:
        _film(job.film, made, denoiser, shard, first)


def _steps(batch: Sequence[SampleSpec], options: SamplerOptions) -> list[int]:
    found: list[int] = options.steps_of(canvas(batch, torch.device("cpu")).free_BS).tolist()
    return found


def _denoiser(job: Job, made: Plan) -> tuple[Denoiser, Shard]:
    prepare(["--sfr-backend", job.backend])
    from megatron_sfr.kl_flow.checkpoint import load_denoiser
    from megatron_sfr.kl_flow.model import denoise
    from megatron_sfr.runtime.parallel import tensor_group, tensor_rank, tensor_size

    model, run = load_denoiser(made.folder, choose(job.backend))
    width = run.padded_vocab_size // tensor_size()
    vocab = Vocab(made.simplex.size, tensor_rank() * width, tensor_group())
    return partial(denoise, model, vocab=vocab), Shard(vocab, width)


def is_up_to_date(job: Job, made: Plan) -> bool:
    """Whether the same job has written the output already; ValueError if another job has."""
    return is_finished(Path(job.output), _identity(job, made))


def _identity(job: Job, made: Plan) -> dict[str, object]:
    return {
        "checkpoint": contents_of(made.folder),
        "tokenizer": tokenizer_sha256(made.tokenizer),
        "requests": [asdict(request) for request in made.requests],
        "options": asdict(made.options) | {"samples": job.samples, "batch_size": job.batch_size, "nproc": job.nproc},
    }


@contextmanager
def _output(job: Job, made: Plan, found: list[list[SampleSpec]], first: bool) -> Iterator[tuple[IO[str], int]]:
    """The output file, which an earlier run may have begun, and its number of lines; other ranks get os.devnull."""
    if not first:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            yield nowhere, 0
        return
    with resumable(Path(job.output), _identity(job, made), lambda lines: whole_batches(found, lines)) as opened:
        yield opened


def _film(path: str, made: Plan, denoiser: Denoiser, shard: Shard, first: bool) -> None:
    """The first request's first sample once more, alone and watched: it does not depend on its batch."""
    from megatron_sfr.runtime.backend import device

    request, recorder = made.requests[0], Recorder(shard)
    area = canvas([SampleSpec(request, 0)], device())
    (tokens,) = sample(denoiser, area, shard, made.simplex, made.options, recorder).tolist()
    if first:
        title = f"KL-flow, {made.options.method}: {request.told.get('question', 'one sample as it forms')}"
        film = recorder.film(title, tokens, request, made.tokenizer)
        Path(path).write_text(json.dumps(asdict(film), ensure_ascii=False), encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Runs a job. Megatron's output goes to stderr, the progress bar to stdout."""
    screen = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    generate(job, plan(job), screen)


lifetime.tie_rank(__name__)
if __name__ == "__main__":
    lifetime.run(main, sys.argv[1:], ERROR)
