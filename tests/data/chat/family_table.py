"""What the chat templates of published models take, as the tests check it, and as a table for docs/data.md.

`python -m tests.data.chat.family_table` prints the table.
"""

from tests.data.chat.families import KINDS, WITH_TOOLS

FIELD = dict.fromkeys(("reasoning", "reasonings"), "leaves out the reasoning_content of reply 1; write reasoning_con")
NO_TOOLS = dict.fromkeys(WITH_TOOLS, "does not write the record's tools; use a template that does, or leave them out")
NO_THOUGHT = dict.fromkeys(("one", "several", "system"), "the generation prompt opens a thought and reply 1 has none")
NO_CALLS = dict.fromkeys(WITH_TOOLS, "the chat template does not write the tool calls of message")
OWN_MARKS = dict.fromkeys(
    ("thought", "thoughts"), "which the chat template marks with '<seed:think>'; give the thought"
)
AFTER_PROMPT = dict.fromkeys(("reasoning", "reasonings"), "write reasoning_content at the start of the content as <th")
# What a family does not take in one sample: only by --turns each, or not at all (the reason).
LIMITS: dict[str, dict[str, str]] = {
    "qwen2.5": FIELD,
    "qwen3-instruct-2507": FIELD,
    "qwen3": {"reasonings": "each", "thoughts": "each"},
    "qwen3-marked": {},
    "qwen3-thinking-2507": {kind: "each" for kind in KINDS if kind not in ("reasoning", "thought")},
    "phi-3": FIELD | NO_TOOLS,
    "phi-3.5": FIELD | NO_TOOLS,
    "phi-4-reasoning": FIELD | NO_TOOLS,
    "smollm2": FIELD | NO_TOOLS,
    "qwen2": FIELD | NO_TOOLS,
    "phi-4": FIELD | NO_TOOLS,
    "phi-4-unsloth": FIELD | NO_TOOLS,
    "smollm3-unsloth": FIELD | NO_TOOLS,
    "seed-oss": OWN_MARKS,
    "mixtral": FIELD | NO_TOOLS,
    "glm-4-0414": FIELD | NO_CALLS,
    "glm-4.5": {"reasonings": "each", "thoughts": "each"},
    "glm-4.5-marked": dict.fromkeys(("reasonings", "thoughts", *WITH_TOOLS), "each"),
    "deepseek-r1": {"thought": "each", "thoughts": "each"} | FIELD | NO_TOOLS,
    "deepseek-v3-thinking": {"thought": "each", "thoughts": "each"} | NO_THOUGHT | AFTER_PROMPT | NO_TOOLS,
    "mistral-v0.1": {"system": "refuses the system turn (Conversation roles must alternate"} | FIELD | NO_TOOLS,
    "mistral-large-2407": {"system": "each", "late tools": "each"} | FIELD,
    "mistral-nemo": {"system": "each", "late tools": "each"} | FIELD,
    "mistral-nemo-marked": {"system": "each", "late tools": "each"} | FIELD,
}
# Options that a family needs.
OPTIONS: dict[str, dict[str, str]] = {
    "glm-4-0414": {"reply_end": "next-turn"},
    "glm-4.5": {"reply_end": "next-turn"},
}

COLUMNS = {
    "several turns": ("one", "several"),
    "system turn, persona": ("system",),
    "tools": WITH_TOOLS,
    "`reasoning_content`": ("reasoning", "reasonings"),
    "`<think>` in the content": ("thought", "thoughts"),
}
NAMES = {
    "qwen2.5": "Qwen2.5",
    "qwen2": "Qwen2, dense and with experts",
    "qwen3-instruct-2507": "Qwen3-Instruct-2507",
    "qwen3": "Qwen3",
    "qwen3-marked": "Qwen3, TRL's template for training",
    "qwen3-thinking-2507": "Qwen3-Thinking-2507",
    "phi-3": "Phi-3",
    "phi-3.5": "Phi-3.5",
    "phi-4": "Phi-4",
    "phi-4-unsloth": "Phi-4, as in Unsloth",
    "phi-4-reasoning": "Phi-4-reasoning, as in Axolotl",
    "smollm2": "SmolLM2 (converted as Llama)",
    "smollm3-unsloth": "SmolLM3, as in llama.cpp",
    "seed-oss": "Seed-OSS",
    "glm-4-0414": "GLM-4-0414, `--reply-end next-turn`",
    "glm-4.5": "GLM-4.5, `--reply-end next-turn`",
    "glm-4.5-marked": "GLM-4.5, TRL's template for training",
    "deepseek-r1": "DeepSeek-R1 (January 2025)",
    "deepseek-v3-thinking": "DeepSeek-V3 with reasoning",
    "mistral-v0.1": "Mistral 7B v0.1",
    "mixtral": "Mixtral 8x7B, Mistral 7B v0.2",
    "mistral-large-2407": "Mistral 7B v0.3, Large 2407, Mixtral 8x22B",
    "mistral-nemo": "Mistral Nemo",
    "mistral-nemo-marked": "Mistral Nemo, with marked replies",
}
REASONS = {  # by a part of the message
    "leaves out the reasoning_content": "no: it leaves `reasoning_content` out",
    "does not write the record's tools": "no: it writes no tools",
    "opens a thought and reply 1 has none": "no: its prompt opens a thought, so each reply needs one",
    "at the start of the content as <th": "no: it leaves `reasoning_content` out",
    "refuses the system turn": "`--persona-as user`: it refuses a system turn",
    "does not write the tool calls": "no: it writes no tool calls",
    "which the chat template marks with": "no: its own marks are `<seed:think>`; give `reasoning_content`",
}


def cell(limits: dict[str, str], kinds: tuple[str, ...]) -> str:
    """What a template takes of these kinds of conversations."""
    found = [limits[kind] for kind in kinds if kind in limits]
    if not found:
        return "yes"
    if set(found) == {"each"}:
        some = [kind for kind in kinds if kind not in limits]
        return "`each`; one reply: yes" if some and some[0] in ("one", "reasoning", "thought") else "`each`"
    (reason,) = {text for part, text in REASONS.items() for limit in found if part in limit}
    return reason


def table() -> str:
    """The table in Markdown."""
    rows = [["template", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[name, *(cell(LIMITS[key], kinds) for kinds in COLUMNS.values())] for key, name in NAMES.items()]
    return "\n".join(f"| {' | '.join(row)} |".replace("| --- ", "|---").replace("|--- |", "|---|") for row in rows)


if __name__ == "__main__":
    print(table())
