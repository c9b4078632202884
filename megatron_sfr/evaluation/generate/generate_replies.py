"""`generate`: replies of a Hugging Face model to a few prompts, as one function."""

from collections.abc import Sequence
from pathlib import Path

from megatron_sfr.data.chat.template_options import AS_AT_INFERENCE, TemplateOptions
from megatron_sfr.evaluation.generate.end_token_warning import warn_of_unknown_end
from megatron_sfr.evaluation.generate.prompts import Prompt, ask
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.evaluation.generate.transformers_engine import load_model, sample


def generate(
    model: str | Path,
    prompts: str | Sequence[str | Prompt],
    *,
    persona: str | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str = "auto",
    template: TemplateOptions = AS_AT_INFERENCE,
) -> list[list[str]]:
    """Samples replies from a Hugging Face model with transformers.

    Equal arguments give equal replies, and different models share their random numbers.

    Args:
        model: a folder such as `export_hf` writes. None of its code is run.
        prompts: user turns, or `Prompt`s of several turns; or one user turn.
        persona: who answers the prompts that are text; it becomes the system turn.
        samples: replies to each prompt.
        temperature: 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 keeps all.
        top_p: only the most likely tokens with this share of the probability.
        max_new_tokens: length at which a reply is cut off.
        seed: selects the random numbers.
        batch_size: replies that are sampled at a time.
        device: torch's name of a device. Default: a GPU if there is one.
        dtype: of the model, such as bfloat16. Default: the model's own.
        template: how prompts are written; it has to be as in training.

    Returns:
        The replies: a list for each prompt, with one text per sample.

    Raises:
        ValueError: the folder is not a model, its files are damaged, or an option is out of its range.

    Example:
        >>> import megatron_sfr as sfr
        >>> replies = sfr.generate("model", ["How was your day?"], samples=2, max_new_tokens=4)
        >>> len(replies), len(replies[0])
        (1, 2)
    """
    place = template.persona_as
    prompts = [prompts] if isinstance(prompts, str) else prompts
    asked = [ask(prompt, persona, place) if isinstance(prompt, str) else prompt for prompt in prompts]
    options = SamplingOptions(samples, temperature, top_k, top_p, max_new_tokens, seed, batch_size, template)
    loaded = load_model(Path(model).name, Path(model), device=device, dtype=dtype)
    warn_of_unknown_end(Path(model), loaded.tokenizer, loaded.end_tokens, template)
    replies: list[list[str]] = [[""] * samples for _ in asked]
    for p, reply in sample(loaded, asked, options):
        replies[p][reply.sample] = reply.text
    return replies
