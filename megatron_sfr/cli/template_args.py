"""The arguments about the chat template that `prepare`, `generate` and `evaluate` share, and what is read from them."""

import argparse
from typing import Any


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    """How conversations and prompts are written; give the same to `prepare` and at inference."""
    parser.add_argument(
        "--persona-as",
        default="system",
        metavar="system|user|field",
        help="where the persona is written: as the system turn; at the start of the first user turn, for templates "
        "without a system turn (a system turn moves there too); or nowhere (%(default)s)",
    )
    parser.add_argument(
        "--template-kwargs",
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--template-date", metavar="YYYY-MM-DD", help="the date in templates that write today's (2024-07-26)"
    )
    parser.add_argument(
        "--special-text",
        default="refuse",
        metavar="refuse|literal",
        help="what happens to text that looks like a control token: refused, or encoded as plain text (%(default)s)",
    )
    parser.add_argument(
        "--reply-end",
        default="template",
        metavar="template|next-turn",
        help="the token that ends a reply: the template's; or, if it writes none, the one that begins the next turn, "
        "for models that stop there, such as GLM (%(default)s)",
    )


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TemplateOptions."""
    from megatron_sfr.data.chat.template_options import DATE, parse_template_kwargs

    return {
        "persona_as": args.persona_as,
        "special_text": args.special_text,
        "template_kwargs": parse_template_kwargs(args.template_kwargs),
        "template_date": args.template_date or DATE,
        "reply_end": args.reply_end,
    }
