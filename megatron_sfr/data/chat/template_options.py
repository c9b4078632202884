"""How a conversation is written and what of it is trained: options of `prepare`, shared in part with inference."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any

from megatron_sfr.storage.user_files import check_choice, parse_json

PERSONA_AS = ("system", "user", "field")
SPECIAL_TEXT = ("refuse", "literal")
TURNS = ("together", "each", "last", "as-rendered")
TRAIN_ON = ("all", "last")
REPLY_END = ("template", "next-turn")
DATE = "2024-07-26"  # what Llama 3's templates write where they have no clock
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}


@dataclass(frozen=True)
class TemplateOptions:
    """How the chat template is used. Training and inference must agree on these.

    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.TemplateOptions(template_kwargs={"enable_thinking": False}).persona_as
        'system'
    """

    persona_as: str = "system"
    """Where a persona is written. 'system': it is the system turn of a record that has none. 'user': it, or the
    record's own system turn, is put at the start of the first user turn, followed by a blank line. 'field': nowhere;
    the sample keeps it."""
    special_text: str = "refuse"
    """What to do with text that looks like a control token of the tokenizer: 'refuse' the record, or encode it as plain
    text ('literal')."""
    template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the template, such as enable_thinking."""
    template_date: str = DATE
    """The day that `strftime_now` returns in the template, as YYYY-MM-DD."""
    reply_end: str = "template"
    """The token that ends a reply. 'template': the one that the template writes; a template without one is refused.
    'next-turn': if the template writes none, the token that begins the turn after the reply, for models that stop there
    (GLM)."""

    def __post_init__(self) -> None:
        check_choice("persona_as", self.persona_as, PERSONA_AS)
        check_choice("special_text", self.special_text, SPECIAL_TEXT)
        check_choice("reply_end", self.reply_end, REPLY_END)
        if taken := sorted(RESERVED & self.template_kwargs.keys()):
            raise ValueError(f"template_kwargs: {taken[0]} is set for each conversation; leave it out")
        try:
            date.fromisoformat(self.template_date)
        except ValueError as error:
            raise ValueError(f"template_date is {self.template_date!r}; write a day as YYYY-MM-DD") from error


@dataclass(frozen=True)
class SampleOptions(TemplateOptions):
    """Which samples a conversation makes.

    Example:
        >>> import megatron_sfr as sfr
        >>> options = sfr.PrepareOptions(chat=sfr.SampleOptions(turns="each"))
        >>> options.chat.train_on
        'all'
    """

    turns: str = "together"
    """'together': one sample with all replies. A record is refused if a reply would follow another context than at
    inference, or lose a part. 'each': one sample for each reply, as inference shows it. 'last': one sample, with the
    last reply. 'as-rendered': one sample, as the template writes the finished conversation."""
    train_on: str = "all"
    """Which replies are trained: 'all' or the 'last' one. `train` and `weight` of a turn exclude further ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("turns", self.turns, TURNS)
        check_choice("train_on", self.train_on, TRAIN_ON)


AS_AT_INFERENCE = TemplateOptions()  # the defaults
ALL_TOGETHER = SampleOptions()


def parse_template_kwargs(text: str | None) -> dict[str, Any]:
    """The variables of --template-kwargs, a JSON object."""
    if text is None:
        return {}
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"--template-kwargs is {error}; write '{{\"enable_thinking\": false}}'") from error
    if not isinstance(value, dict):
        raise ValueError("--template-kwargs is not a JSON object; write '{\"enable_thinking\": false}'")
    return value


def variables_of(tokenizer: Any) -> set[str]:
    """The variables of a tokenizer's chat templates that nothing else sets."""
    sources = tokenizer.chat_template
    read = set().union(*map(_variables, sources.values() if isinstance(sources, dict) else [sources]))
    return read - RESERVED - tokenizer.special_tokens_map.keys()


def check_variable(name: str, tokenizer: Any) -> None:
    """ValueError for a variable that no chat template of the tokenizer reads."""
    known = sorted(variables_of(tokenizer))
    if name not in known:
        names = f"use {', '.join(known)}" if known else "leave it out: the template has no variables"
        raise ValueError(f"--template-kwargs: the chat template does not read {name!r}; {names}")


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    from jinja2 import meta

    from megatron_sfr.data.chat.template_limits import compiled

    environment = compiled(template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys())
