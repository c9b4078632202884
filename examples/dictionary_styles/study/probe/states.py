"""Real replies to held-out headwords, prepared and embedded as for training, and models' hidden states at them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from examples.dictionary_styles.selection import draw
from examples.dictionary_styles.study.plan import Plan
from examples.dictionary_styles.study.probe.measures import Anchored
from examples.dictionary_styles.study.probe.positions import Positions
from examples.dictionary_styles.study.work import CHOOSING, JUDGING, Place, headwords, megatron_sfr, rows
from megatron_sfr.data.prepared.conversations import PreparedData, Sample
from megatron_sfr.data.targets.store import DEFAULT, STATISTICS, TargetStore
from megatron_sfr.evaluation.generate.transformers_engine import load_network
from megatron_sfr.storage.atomic import replacing

HORIZONS = ("1:64", "1:16", "17:48")  # the one that the head is trained on, and its near and its far part
CUT = ("--seq-length", 128, "--stride", 8, "--min-segment-length", 8, "--too-long", "truncate", "--workers", 1)


def prepared_replies(plan: Plan, place: Place, folder: Path) -> tuple[PreparedData, Positions]:
    """The longest real reply of each persona to each held-out headword of both sides, and the positions of h.

    Nothing is chosen by the choosing side in a regime with fixed settings, so both sides are held out.
    """
    source, text = folder / "replies.jsonl", folder / "text"
    if not source.exists():
        asked = [entry for side in (CHOOSING, JUDGING) for entry in headwords(side, plan, place)]
        longest = [max(entry.references, key=lambda c: len(c.messages[-1]["content"])) for entry in asked]
        with replacing(source) as file:
            file.writelines(json.dumps({"messages": c.messages[-2:], "persona": c.persona}) + "\n" for c in longest)
    if not (text / DEFAULT / STATISTICS).exists():
        cut = ("--tokenizer", place.model, *CUT, "--horizons", *HORIZONS)
        megatron_sfr(folder / "prepare.log", "prepare", "--input", source, "--output", text, *cut)
        megatron_sfr(folder / "embed.log", "embed", "--data", text, "--encoder", "minilm", "--dtype", "bfloat16")
    data, records = PreparedData.open(text), rows(source)
    samples = [data[i] for i in range(len(data))]
    assert [s.persona for s in samples] == [r["persona"] for r in records], "a reply is not one sample"
    lengths = [len(supervised(sample)) for sample in samples]
    words, headword = np.unique([record["messages"][-2]["content"] for record in records], return_inverse=True)
    persona = np.unique([sample.persona for sample in samples], return_inverse=True)[1]
    distance = np.concatenate([np.arange(length) for length in lengths])
    quarter = np.array([int(4 * draw(0, "probe", word)) for word in words])
    return data, Positions(headword.repeat(lengths), persona.repeat(lengths), distance, quarter)


def supervised(sample: Sample) -> np.ndarray:
    """The positions that predict a token of a reply, int64 [T]."""
    return np.flatnonzero(sample.loss_mask[1:])


def anchored_targets(data: PreparedData) -> dict[str, Anchored]:
    """The anchors of each horizon, as indices into the positions of all samples, with their targets."""
    store, before, found = TargetStore.open(data.folder / DEFAULT, data), 0, []
    for sample in (data[i] for i in range(len(data))):
        places, anchors = supervised(sample), sample.anchors
        index = before + np.searchsorted(places, anchors.position)
        found.append(np.stack([anchors.horizon, index, anchors.segment]))
        before += len(places)
    horizon, index, segment = np.concatenate(found, axis=1)
    names = [f"tokens {offset} to {offset + length - 1} ahead" for offset, length in data.manifest.horizons]
    chosen = {name: horizon == i for i, name in enumerate(names)}
    return {name: (index[some], store[segment[some]].astype(np.float64)) for name, some in chosen.items()}


def states_of(model: Path, data: PreparedData, path: Path) -> np.ndarray:
    """h of a Hugging Face folder at the positions of all samples, fp32 [N, H]; kept as fp16 in a file."""
    if not path.exists():
        samples = [data[i] for i in range(len(data))]
        h_NH = hidden_states(load_network(model, "auto", "cpu").base_model, samples)
        with replacing(path, "wb") as file:
            np.save(file, h_NH.astype(np.float16))
    return np.load(path).astype(np.float32)


@torch.inference_mode()
def hidden_states(backbone: Any, samples: Sequence[Sample], batch_size: int = 16) -> np.ndarray:
    """The last hidden state at the positions that predict a token of a reply, fp32 [N, H]. backbone: no LM head."""
    found: dict[int, np.ndarray] = {}
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].tokens))
    for batch in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
        tokens = [torch.from_numpy(samples[i].tokens[:-1]).long() for i in batch]
        padded_BL = pad_sequence(tokens, batch_first=True)  # on the right, where a causal model's tokens do not attend
        states_BLH = backbone(input_ids=padded_BL, use_cache=False).last_hidden_state.float()
        found |= {i: states[supervised(samples[i])].numpy() for i, states in zip(batch, states_BLH, strict=True)}
    return np.concatenate([found[i] for i in range(len(samples))])
