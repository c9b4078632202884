"""`evaluate`: samples Hugging Face models on held-out conversations and compares them, as one function."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions
from megatron_sfr.evaluation.compare.curves import Scorer
from megatron_sfr.evaluation.compare.questions import EvaluationOptions
from megatron_sfr.evaluation.compare.replies import Hardware, answers
from megatron_sfr.evaluation.compare.report import Axes, Report
from megatron_sfr.evaluation.compare.write_report import axes_of, style_judge, write_report
from megatron_sfr.evaluation.generate.engines import Engine, HuggingFace
from megatron_sfr.evaluation.generate.prompts import limit, read_asked
from megatron_sfr.evaluation.generate.sampling import SamplingOptions, reply_line
from megatron_sfr.evaluation.judge.judge_replies import Judge
from megatron_sfr.storage.atomic import replacing


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
    hardware = Hardware() if hardware is None else hardware
    folders = {name: Path(folder) for name, folder in models.items()}
    return evaluate_engine(
        HuggingFace(folders, device=hardware.device, dtype=hardware.dtype),
        Path(data),
        Path(output),
        EvaluationOptions(SamplingOptions()) if options is None else options,
        max_prompts=max_prompts,
        encoder=encoder,
        device=hardware.device,
        processes=hardware.processes,
        identity=identity,
        show=show,
    )


def evaluate_engine(
    engine: Engine,
    data: Path,
    output: Path,
    options: EvaluationOptions,
    *,
    max_prompts: int,
    encoder: str,
    device: str | None,
    processes: int,
    judge: Judge | None = None,
    identity: Mapping[str, object] | None,
    show: bool = True,
) -> Report:
    """`evaluate` for the models of any engine. device: of the encoder; processes: models sampled in parallel."""
    engine.check()
    asked = limit(read_asked(data, options.sampling.template.persona_as), max_prompts)
    if not asked:
        raise ValueError(f"{data} has no conversations")
    style = style_judge(asked)
    loaded = Encoder(encoder, EncoderOptions(device=device))
    scorer = Scorer(asked, {"held-out replies": asked}, options, loaded, judge=style)
    return sample_and_write(
        engine,
        scorer,
        axes_of(style),
        output,
        title=f"{data.name}: diversity against quality",
        picture="frontier.png",
        processes=processes,
        judge=judge,
        identity=identity,
        show=show,
    )


def sample_and_write(
    engine: Engine,
    scorer: Scorer,
    axes: Sequence[Axes],
    output: Path,
    *,
    title: str,
    picture: str,
    processes: int,
    judge: Judge | None = None,
    identity: Mapping[str, object] | None = None,
    show: bool = True,
) -> Report:
    """Samples every model, writes the replies to samples.jsonl, then scores them as `write_report` says."""
    questions = scorer.questions()
    drawn = f"{scorer.options.sampling.samples} replies to each pair at each temperature"
    if engine.shares_randomness:
        drawn += "; random numbers are shared"
    answered = answers(engine, questions, processes)
    with replacing(output / "samples.jsonl") as file:
        for model in answered:
            for options, rows in zip(questions.sweep, model.replies, strict=True):
                for prompt, row in zip(questions.prompts, rows, strict=True):
                    file.writelines(reply_line(model.model, prompt, options, reply) for reply in row)
    return write_report(
        [model.answered() for model in answered],
        scorer,
        axes,
        output,
        title=title,
        picture=picture,
        drawn=drawn,
        samples="samples.jsonl",
        judge=judge,
        identity=identity,
        show=show,
    )
