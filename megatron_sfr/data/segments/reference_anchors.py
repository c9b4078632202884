"""Anchors and windows as SFR's public code places them (WeAgentAI/SFR at 4034cf9), for `prepare --preset reference`.

All supervised tokens of a conversation form one stream y_0 ... y_{N-1}, whichever reply they are in. The anchors are
the positions t = 0, stride, 2 stride, ... of the stream: the condition is the hidden state at the input token y_t,
which the model has read, and the window (o, L) is y_{t+o} ... y_{t+o+L-1}, cut at y_{N-1}. Windows therefore run into
the next reply. The text is what the tokenizer decodes these ids to, without special tokens. docs/differences.md
compares this with our own anchors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from megatron_sfr.data.segments.anchors import Cut, Segment
from megatron_sfr.data.segments.segmenters import is_whole_reply

AnchorRule = Literal["replies", "reference"]
"""'replies': ours, `anchors.py`. 'reference': this module."""


def reference_futures(
    tokens: np.ndarray, replies: Sequence[tuple[int, int]], tokenizer: Any, cut: Cut
) -> Iterator[tuple[Segment, str]]:
    """The windows of the stream of all replies [start, end) of tokens [n] and their texts, by position, then horizon.

    Windows that the end of the stream cuts to fewer tokens than L and than `min_segment_length` are left out.
    """
    stream = np.concatenate([np.arange(start, end) for start, end in replies])
    N = len(stream)
    for t in range(0, N, cut.stride):
        for horizon, (offset, length) in enumerate(cut.horizons):
            whole = is_whole_reply((offset, length))
            first, last = (0, N) if whole else (t + offset, min(t + offset + length, N))
            if first < last and (whole or last - first == length or last - first >= cut.min_segment_length):
                segment = Segment(
                    position=int(stream[t]),
                    start=int(stream[first]),
                    end=int(stream[last - 1]) + 1,
                    response=0,
                    ordinal=t,
                    length=N,
                    horizon=horizon,
                )
                yield segment, tokenizer.decode(tokens[stream[first:last]], skip_special_tokens=True)


def with_last_input(tokens: np.ndarray, loss_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Appends an unsupervised token where the last token is supervised.

    A sample's last token is only predicted. The authors' code reads it too and has a hidden state there; the appended
    token makes it an input, and is itself neither read nor predicted.
    """
    if not loss_mask[-1]:
        return tokens, loss_mask
    return np.append(tokens, tokens[-1:]), np.append(loss_mask, np.zeros(1, loss_mask.dtype))
