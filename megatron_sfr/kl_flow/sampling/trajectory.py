"""The trajectory of one sample: at each step the denoiser's most likely tokens and their probabilities."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sfr.kl_flow.sampling.requests import Request
from megatron_sfr.kl_flow.sampling.samplers import Moment
from megatron_sfr.kl_flow.sampling.vocab_shard import Shard

MOST_FRAMES = 120
STILLS = 8  # frames printed where the output cannot be redrawn
DIM, BRIGHT = 238, 255  # grey levels of xterm's 256 colours


@dataclass(frozen=True)
class Frame:
    """The free positions at time t: most likely token ids and their probabilities in percent."""

    step: int
    t: float
    tokens: tuple[int, ...]
    percent: tuple[int, ...]


@dataclass(frozen=True)
class Film:
    """Frames of the free positions [start, stop) of a sequence.

    `tokens` is the final sequence. Of a tail of `end` tokens only the first is shown.
    """

    title: str
    tokens: tuple[int, ...]
    start: int
    stop: int
    frames: tuple[Frame, ...]
    texts: dict[int, str]
    """The text of each token."""
    end: int | None = None

    def row(self, frame: Frame) -> Iterator[tuple[str, int | None]]:
        """(text, percent) of each shown position; percent is None at given positions."""
        tokens = [*self.tokens[: self.start], *frame.tokens, *self.tokens[self.stop :]]
        shown = len(tokens)
        while shown > 1 and tokens[shown - 1] == tokens[shown - 2] == self.end:
            shown -= 1
        for position, token in enumerate(tokens[:shown]):
            free = self.start <= position < self.stop
            yield self.texts[token], frame.percent[position - self.start] if free else None


def from_json(text: str) -> Film:
    """Reads a film that `json.dumps(asdict(film))` wrote."""
    data = json.loads(text)
    frames = tuple(Frame(f["step"], f["t"], tuple(f["tokens"]), tuple(f["percent"])) for f in data["frames"])
    texts = {int(token): text for token, text in data["texts"].items()}
    return Film(data["title"], tuple(data["tokens"]), data["start"], data["stop"], frames, texts, data["end"])


class Recorder:
    """Records evenly spaced steps while one sequence is sampled. Every rank must call it."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.frames: list[Frame] = []

    def __call__(self, moment: Moment) -> None:
        every = -(-moment.steps // (MOST_FRAMES - 1))
        if moment.number % every and moment.number != moment.steps:
            return
        token_F, p_F = self.shard.likeliest(self.shard.softmax(moment.logits_FW))
        percent = (100 * p_F).round().int().tolist()
        self.frames.append(Frame(moment.number, moment.t, tuple(token_F.tolist()), tuple(percent)))

    def film(self, title: str, tokens: Sequence[int], request: Request, tokenizer: Any) -> Film:
        """The recorded film; `tokens` is the final sequence, and replaces the most likely tokens of the last frame."""
        last, gap = self.frames[-1], request.gaps[0]
        final = tuple(tokens[gap.start : gap.stop])
        frames = [*self.frames[:-1], Frame(last.step, last.t, final, last.percent)]
        ids = {*tokens, *(token for frame in frames for token in frame.tokens)}
        texts = {token: tokenizer.decode([token]) for token in sorted(ids)}
        return Film(title, tuple(tokens), gap.start, gap.stop, tuple(frames), texts, gap.end)


def stills(film: Film) -> Iterator[str]:
    """Some frames as plain text. Tokens of less than 50 % are shown as dots."""
    count = min(STILLS, len(film.frames))
    for i in range(count):
        frame = film.frames[round(i * (len(film.frames) - 1) / max(1, count - 1))]
        row = (
            _printed(text) if percent is None or percent >= 50 else "·" * len(text) for text, percent in film.row(frame)
        )
        yield f"step {frame.step:4d}  t {frame.t:.3f}  {''.join(row)}"


def moving(film: Film, columns: int) -> Iterator[str]:
    """Frames for a terminal, each drawn over the previous one. Less certain tokens are greyer, given ones blue."""
    lines = 0
    for frame in film.frames:
        head = f"step {frame.step:4d}  t {frame.t:.3f}"
        row = "".join(_coloured(_printed(text), percent) for text, percent in film.row(frame))
        count = sum(len(_printed(text)) for text, _ in film.row(frame))
        back = f"\x1b[{lines}A\r\x1b[J" if lines else ""
        lines = 1 + -(-max(count, 1) // columns)
        yield f"{back}{head}\n{row}\n"


def _printed(text: str) -> str:
    """The text on one line of printable characters, so that no control character moves the cursor."""
    return "".join(character if character.isprintable() else "⏎" if character == "\n" else " " for character in text)


def _coloured(text: str, percent: int | None) -> str:
    level = 75 if percent is None else DIM + round((BRIGHT - DIM) * percent / 100)
    return f"\x1b[38;5;{level}m{text}\x1b[0m"
