"""A film of one sample as it forms: at each step the token that the denoiser thinks likeliest, and how sure it is."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sfr.simplex_sampling.requests import Request
from megatron_sfr.simplex_sampling.samplers import Moment
from megatron_sfr.simplex_sampling.shards import Shard

MOST_FRAMES = 120
STILLS = 8  # frames that a terminal shows which cannot draw over itself
DIM, BRIGHT = 238, 255  # grey levels of xterm's 256 colours


@dataclass(frozen=True)
class Frame:
    """What the free positions look like at time t: token ids, and the probability of each in percent."""

    step: int
    t: float
    tokens: tuple[int, ...]
    percent: tuple[int, ...]


@dataclass(frozen=True)
class Film:
    """Frames of the free positions [start, stop) of a row; `tokens` is the row in the end, and where `end` fills its
    tail only the first one is shown."""

    title: str
    tokens: tuple[int, ...]
    start: int
    stop: int
    frames: tuple[Frame, ...]
    texts: dict[int, str]
    """What each token says."""
    end: int | None = None

    def row(self, frame: Frame) -> Iterator[tuple[str, int | None]]:
        """(text, percent) of each position of the row that is shown; None percent: it is given."""
        tokens = [*self.tokens[: self.start], *frame.tokens, *self.tokens[self.stop :]]
        shown = len(tokens)
        while shown > 1 and tokens[shown - 1] == tokens[shown - 2] == self.end:
            shown -= 1
        for position, token in enumerate(tokens[:shown]):
            free = self.start <= position < self.stop
            yield self.texts[token], frame.percent[position - self.start] if free else None


def from_json(text: str) -> Film:
    """The film that `json.dumps(asdict(film))` wrote."""
    told = json.loads(text)
    frames = tuple(Frame(f["step"], f["t"], tuple(f["tokens"]), tuple(f["percent"])) for f in told["frames"])
    texts = {int(token): said for token, said in told["texts"].items()}
    return Film(told["title"], tuple(told["tokens"]), told["start"], told["stop"], frames, texts, told["end"])


class Recorder:
    """Watches the sampling of one row, on every rank, and keeps evenly spaced steps of it."""

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
        """The film of the request's row, of which these tokens came."""
        last, found = self.frames[-1], tuple(tokens[request.start : request.stop])
        frames = [*self.frames[:-1], Frame(last.step, last.t, found, last.percent)]
        ids = {*tokens, *(token for frame in frames for token in frame.tokens)}
        texts = {token: tokenizer.decode([token]) for token in sorted(ids)}
        return Film(title, tuple(tokens), request.start, request.stop, tuple(frames), texts, request.end)


def stills(film: Film) -> Iterator[str]:
    """Some frames as plain text; of a token that is not yet half certain only its length is seen."""
    count = min(STILLS, len(film.frames))
    for i in range(count):
        frame = film.frames[round(i * (len(film.frames) - 1) / max(1, count - 1))]
        row = (
            _printed(text) if percent is None or percent >= 50 else "·" * len(text) for text, percent in film.row(frame)
        )
        yield f"step {frame.step:4d}  t {frame.t:.3f}  {''.join(row)}"


def moving(film: Film, columns: int) -> Iterator[str]:
    """Frames for a terminal, each over the one before: the greyer the less certain, what is given blue."""
    lines = 0
    for frame in film.frames:
        head = f"step {frame.step:4d}  t {frame.t:.3f}"
        row = "".join(_coloured(_printed(text), percent) for text, percent in film.row(frame))
        letters = sum(len(_printed(text)) for text, _ in film.row(frame))
        back = f"\x1b[{lines}A\r\x1b[J" if lines else ""
        lines = 1 + -(-max(letters, 1) // columns)
        yield f"{back}{head}\n{row}\n"


def _printed(text: str) -> str:
    """One line of letters that a terminal shows: no control character moves its cursor."""
    return "".join(letter if letter.isprintable() else "⏎" if letter == "\n" else " " for letter in text)


def _coloured(text: str, percent: int | None) -> str:
    level = 75 if percent is None else DIM + round((BRIGHT - DIM) * percent / 100)
    return f"\x1b[38;5;{level}m{text}\x1b[0m"
