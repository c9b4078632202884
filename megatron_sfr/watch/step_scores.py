"""The replies of one checkpoint and their scores, on the same prompts with the same random numbers at every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path

from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.evaluation.compare.curves import Scorer, Scores
from megatron_sfr.evaluation.compare.questions import Answered, EvaluationOptions
from megatron_sfr.evaluation.compare.report import summarize
from megatron_sfr.evaluation.compare.write_report import style_judge
from megatron_sfr.evaluation.generate.end_token_warning import warn_of_unknown_end
from megatron_sfr.evaluation.generate.prompts import Asked
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions
from megatron_sfr.evaluation.generate.transformers_engine import load_model, sample
from megatron_sfr.evaluation.scores.bootstrap import Estimate, estimate


@dataclass(frozen=True)
class WatchOptions:
    """How checkpoints are sampled and scored."""

    sampling: SamplingOptions
    """Replies, temperature and template."""
    encoder: str | None = "minilm"
    """A sentence-transformers model. None: scores by words only."""
    device: str = "cpu"
    """torch's name of the device of model and encoder. The GPUs of the machine are probably training."""
    dtype: str = "auto"
    """Data type of the model. auto: the checkpoint's."""


class StepScorer:
    """Samples one model after another and scores their replies. What needs time is loaded at the first one."""

    def __init__(self, asked: Sequence[Asked], options: WatchOptions) -> None:
        self.asked, self.options = asked, options
        self._warned = False

    @cached_property
    def _scorer(self) -> Scorer:
        sampling, encoder = self.options.sampling, self.options.encoder
        loaded = Encoder(encoder, EncoderOptions(device=self.options.device)) if encoder is not None else None
        options = EvaluationOptions(sampling, (sampling.temperature,), embedded=sampling.samples, one_temperature=True)
        return Scorer(self.asked, {}, options, loaded, judge=style_judge(self.asked))

    @cached_property
    def _real(self) -> Scores:
        return self._scorer.real()

    @cached_property
    def real(self) -> dict[str, Estimate]:
        """The scores of the real replies, where the prompts have some."""
        if not any(entry.references for entry in self.asked):
            return {}
        return _known({name: estimate(values) for name, values in self._real.items()})

    def sample(self, model: Path) -> list[list[Sampled]]:
        """The replies of a Hugging Face folder to each prompt."""
        loaded = load_model(model.name, model, device=self.options.device, dtype=self.options.dtype)
        if not self._warned:
            warn_of_unknown_end(model, loaded.tokenizer, loaded.end_tokens)
            self._warned = True
        rows: list[list[Sampled]] = [[] for _ in self.asked]
        for p, reply in sample(loaded, [entry.prompt for entry in self.asked], self.options.sampling):
            rows[p].append(reply)
        return rows

    def scores(self, replies: Sequence[Sequence[Sampled]]) -> dict[str, Estimate]:
        """Every score that has a value for these prompts."""
        texts = [[reply.text for reply in row] for row in replies]
        curve = self._scorer.curve(Answered("", (self.options.sampling.temperature,), [texts]))
        report = summarize([curve], [], [], self._real)
        return _known({name: values[0] for name, values in report.scores[""].items()})


def _known(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    return {name: value for name, value in estimates.items() if value.n and isfinite(value.mean)}
