"""Measures the time of scoring: synthetic replies of several personas through every metric, with each metric's share.

Run: OMP_NUM_THREADS=2 python -m tools.bench_evaluate [--replies 10000] [--words 60]. Sampling the model is not counted.
"""

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

from megatron_sfr.data.chat.conversation import Conversation
from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.evaluation.compare import curves
from megatron_sfr.evaluation.compare.curves import Scorer
from megatron_sfr.evaluation.compare.questions import EvaluationOptions
from megatron_sfr.evaluation.generate.prompts import Asked, ask
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.evaluation.scores.style import Styled, StyleJudge

PERSONAS = tuple(f"persona {letter}" for letter in "abcdefgh")
SAMPLES = 20
METRICS = "cross_style_bleu self_bleu distinct_n spread vendi_score mode_coverage relevance style_match loop_share"


class Clock:
    """Seconds spent in each wrapped function."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return timed


def replies(prompt: int, persona: int, count: int, words: int) -> list[str]:
    """Random words by Zipf's law, with preferences of each persona and prompt."""
    rng = random.Random(1000 * prompt + persona)
    vocabulary = [f"w{rng.randrange(20) * 8 + persona}" for _ in range(30)] + [f"w{1000 + i}" for i in range(2000)]
    weights = [1 / (i + 5) for i in range(len(vocabulary))]
    return [" ".join(rng.choices(vocabulary, weights, k=words)) for _ in range(count)]


def measure(total: int, words: int) -> None:
    prompts = max(2, total // (len(PERSONAS) * SAMPLES))
    cells = [(p, k) for p in range(prompts) for k in range(len(PERSONAS))]
    asked, sampled = [], []
    for p, k in cells:
        real, *rest = replies(p, k, SAMPLES + 1, words)
        turn = {"role": "assistant", "content": real}
        asked.append(Asked(ask(f"question {p}", PERSONAS[k]), [Conversation("", 0, [turn], PERSONAS[k])]))
        sampled.append(rest)
    clock = Clock()
    for name in METRICS.split():
        setattr(curves, name, clock.around(name, getattr(curves, name)))
    encoder = Encoder("minilm", EncoderOptions(device="cpu"))
    setattr(encoder, "encode", clock.around("embedding", encoder.encode))  # noqa: B010  # mypy: a method
    setattr(StyleJudge, "share", clock.around("style fidelity: judging", StyleJudge.share))  # noqa: B010
    started = time.perf_counter()
    train = clock.around("style fidelity: training", StyleJudge)
    judge = train([Styled(entry.prompt.shared, entry.prompt.persona or "", entry.texts[0]) for entry in asked])
    options = EvaluationOptions(SamplingOptions(samples=SAMPLES))
    scorer = Scorer(asked, {}, options, encoder, judge=judge)
    scorer.scores(sampled, scorer.embedded(sampled))
    seconds = time.perf_counter() - started
    print(
        f"{len(cells) * SAMPLES:,} replies of {words} words, {prompts} prompts x {len(PERSONAS)} personas x {SAMPLES}"
    )
    print(f"pairs capped at {options.pairs}; all would be {(SAMPLES * (SAMPLES - 1)):,} per cell")
    for name, spent in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:30s} {spent:8.2f} s")
    print(f"{'all':30s} {seconds:8.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=10_000)
    parser.add_argument("--words", type=int, default=60)
    args = parser.parse_args()
    measure(args.replies, args.words)


if __name__ == "__main__":
    main()
