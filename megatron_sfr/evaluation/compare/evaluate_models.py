"""`evaluate`: compares Hugging Face models on held-out conversations, as one function."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.evaluation.compare.curves import EvaluationOptions, Scorer
from megatron_sfr.evaluation.compare.evaluate import evaluate as evaluate_and_write
from megatron_sfr.evaluation.compare.replies import Hardware
from megatron_sfr.evaluation.compare.report import Axes, Report
from megatron_sfr.evaluation.generate.prompts import Asked, limit, read_asked
from megatron_sfr.evaluation.generate.transformers_engine import SamplingOptions
from megatron_sfr.evaluation.scores.style import Styled, StyleJudge


def evaluate(
    models: Mapping[str, str | Path],
    data: str | Path,
    output: str | Path,
    options: EvaluationOptions | None = None,
    *,
    max_prompts: int = 64,
    encoder: str = "minilm",
    hardware: Hardware | None = None,
    identity: Mapping[str, object] | None = None,
    show: bool = True,
) -> Report:
    """Compares models over a sweep of temperatures: diversity against quality.

    Every model answers the prompts of the conversations; their replies are the references. Writes
    report.html, report.md, evaluation.json, samples.jsonl and frontier.png.

    Args:
        models: {name: Hugging Face folder}. The first model is the baseline of the others.
        data: JSONL conversations held out of training.
        output: the folder to write.
        options: sampling, temperatures and scores. Default: 8 replies at temperatures 0.5, 0.7, 1.0 and 1.3.
        max_prompts: at most this many different prompts.
        encoder: a sentence-transformers model, or minilm.
        hardware: device, dtype and models that run at the same time. Default: a GPU if there is one.
        identity: what decides the numbers, kept in evaluation.json.
        show: print the table.

    Returns:
        Scores, frontiers and intervals.

    Raises:
        ValueError: data or models cannot be read, or there are no conversations.

    Example:
        >>> import megatron_sfr as sfr
        >>> sampling = sfr.SamplingOptions(samples=2, max_new_tokens=4)
        >>> options = sfr.EvaluationOptions(sampling, temperatures=(0.5, 1.0), pairs=1)
        >>> report = sfr.evaluate({"a": "model", "b": "exported"}, "chats.jsonl", "comparison", options, show=False)
        >>> report.temperatures
        (0.5, 1.0)
    """
    data = Path(data)
    options = EvaluationOptions(SamplingOptions()) if options is None else options
    asked = limit(read_asked(data, options.sampling.template.persona_as), max_prompts)
    if not asked:
        raise ValueError(f"{data} has no conversations")
    hardware = Hardware() if hardware is None else hardware
    judge = style_judge(asked)
    loaded = Encoder(encoder, EncoderOptions(device=hardware.device))
    scorer = Scorer(asked, {"held-out replies": asked}, options, loaded, judge=judge)
    axes = [Axes("relevance", "self-BLEU-4"), Axes("relevance", "modes")]
    axes += [Axes("style fidelity", "CS-SB-1")] if judge else []
    return evaluate_and_write(
        {name: Path(folder) for name, folder in models.items()},
        scorer,
        axes,
        Path(output),
        title=f"{data.name}: diversity against quality",
        picture="frontier.png",
        hardware=hardware,
        identity=identity,
        show=show,
    )


def style_judge(asked: Sequence[Asked]) -> StyleJudge | None:
    """A judge trained on the replies of the data; None if they have only one persona or one prompt."""
    rows = [Styled(entry.prompt.shared, entry.prompt.persona or "", text) for entry in asked for text in entry.texts]
    if len({row.persona for row in rows}) < 2 or len({row.shared for row in rows}) < 2:
        return None
    return StyleJudge(rows)
