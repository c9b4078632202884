"""`evaluate_replies`: compares models by replies that exist already, of any trainer's models. Loads no model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sfr.evaluation.compare.curves import Scorer
from megatron_sfr.evaluation.compare.questions import Answered, EvaluationOptions
from megatron_sfr.evaluation.compare.reply_files import reply_files
from megatron_sfr.evaluation.compare.report import Axes, Report
from megatron_sfr.evaluation.compare.write_report import axes_of, style_judge, write_report
from megatron_sfr.evaluation.generate.prompts import Asked, limit, read_asked
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.evaluation.judge.judge_replies import Judge

ONE_TEMPERATURE = "No model has two temperatures: diversity cannot be distinguished from a higher temperature"


def evaluate_replies(
    files: Mapping[Path, str | None] | Mapping[str, str | None],
    output: str | Path,
    data: str | Path | None = None,
    options: EvaluationOptions | None = None,
    *,
    max_prompts: int | None = None,
    encoder: str | None = "minilm",
    device: str | None = None,
    persona_as: str = "system",
    judge: Judge | None = None,
    identity: Mapping[str, object] | None = None,
    show: bool = True,
) -> Report:
    """Compares models by files of their replies: diversity against quality.

    A record is what `generate` writes, or has `prompt` or `messages`, `text`, and optionally `persona`, `model`,
    `temperature` and `sample`. Writes report.html, report.md, evaluation.json and, if there is a measure of quality,
    frontier.png. Memory holds where each reply lies and one prompt's replies at a time.

    Args:
        files: {path: name of its model}. With None, the records name it, or else the file. The first model read is the
            baseline of the others.
        output: the folder to write.
        data: JSONL conversations whose replies are the references. Default: no references; the scores that compare with
            real replies then have no value.
        options: how much of the replies the quadratic and the slow scores use.
        max_prompts: at most this many different prompts. Default: all.
        encoder: a sentence-transformers model, or minilm. None: scores by words only, without torch.
        device: torch's name of the encoder's device. Default: a GPU if there is one.
        persona_as: how a persona became part of the prompts, as in `TemplateOptions`.
        judge: rates context relevance and style. Default: nobody does.
        identity: what decides the numbers, kept in evaluation.json.
        show: print the table.

    Returns:
        Scores, frontiers and intervals.

    Raises:
        ValueError: a file cannot be read, or no prompt of the data has a reply.

    Example:
        >>> import json, pathlib, megatron_sfr as sfr
        >>> records = [
        ...     {"model": m, "prompt": "Why?", "persona": p, "temperature": 1.0, "sample": i, "text": f"{m} {p} {i}"}
        ...     for m in "ab" for p in ("poet", "cook") for i in range(3)
        ... ]
        >>> _ = pathlib.Path("replies.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
        >>> report = sfr.evaluate_replies({"replies.jsonl": None}, "judged", encoder=None, show=False)
        >>> list(report.scores), report.temperatures
        (['a', 'b'], (1.0,))
    """
    options = EvaluationOptions(SamplingOptions()) if options is None else options
    references = [] if data is None else read_asked(Path(data), persona_as)
    if data is not None and not references:
        raise ValueError(f"{data} has no conversations")
    with reply_files({Path(path): name for path, name in files.items()}, persona_as) as found:
        asked = found.asked(references)
        outside = found.outside(asked)
        asked = limit(asked, max_prompts) if max_prompts else asked
        style = style_judge(asked)
        scorer = Scorer(asked, {}, options, _encoder(encoder, device), judge=style)
        answered = found.answered(asked)
        return write_report(
            answered,
            scorer,
            axes_of(style, embeds=scorer.encoder is not None) if data else _axes_without_references(scorer, asked),
            Path(output),
            title=f"{Path(data).name if data else 'Replies'}: diversity against quality",
            picture="frontier.png",
            drawn=_drawn(found.replies, outside, answered),
            judge=judge,
            identity=identity,
            show=show,
        )


def _encoder(name: str | None, device: str | None):  # type: ignore[no-untyped-def]  # its type is a heavy import
    if name is None:
        return None
    from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions

    return Encoder(name, EncoderOptions(device=device))


def _axes_without_references(scorer: Scorer, asked: Sequence[Asked]) -> list[Axes]:
    """Relevance to the question is the one measure of quality that needs no real reply, but an encoder."""
    if scorer.encoder is None:
        return []
    personas = {entry.prompt.persona for entry in asked}
    return [Axes("context", "self-BLEU-4"), *([Axes("context", "CS-SB-1")] if len(personas) > 1 else [])]


def _drawn(replies: int, outside: int, answered: Sequence[Answered]) -> str:
    text = f"{replies:,} replies of {len(answered)} models, read from files"
    if outside:
        text += f"; {outside:,} pairs with replies are not in the data and were left out"
    if all(len(model.temperatures) < 2 for model in answered):
        text += f". {ONE_TEMPERATURE}"
    return text
