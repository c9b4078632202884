"""The page of the example: a few questions, each asked of every persona, before and after fine-tuning, side by side."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from examples.dictionary_styles.dictd import SOURCES
from megatron_sfr.html import document, folded, note, table
from megatron_sfr.storage.atomic import replacing

QUESTIONS = 12
TITLE = "SmolLM2-135M in eight voices"
PERSONAS = [source.persona for source in SOURCES]


def write_questions(root: Path) -> None:
    """Asks every persona for the held-out headwords that most dictionaries define."""
    words = dict.fromkeys(record["messages"][0]["content"] for record in _records(root / "text" / "prompts.jsonl"))
    with replacing(root / "questions.jsonl") as file:
        for question in list(words)[:QUESTIONS]:
            file.writelines(json.dumps({"prompt": question, "persona": persona}) + "\n" for persona in PERSONAS)


def write_page(root: Path, models: Sequence[str]) -> None:
    """page.html: one table a question, with the reply of every model and the dictionary's own."""
    replies: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for record in _records(root / "replies.jsonl"):
        replies[record["question"]][record["persona"], record["model"]] = record["text"]
    own: dict[tuple[str, str], str] = {}
    for record in _records(root / "text" / "prompts.jsonl"):
        question, reply = (message["content"] for message in record["messages"])
        own.setdefault((question, record["persona"]), reply)
    parts = [
        note(
            "The first reply of each model at temperature 0.7; none was chosen. No word asked for here was in the "
            "training data. 'before' is the model as it was published, de-quantized from 4 bits. 'dictionary' is the "
            "first definition in the persona's own dictionary, where it has the word."
        )
    ]
    for number, (question, said) in enumerate(replies.items()):
        rows = [["persona", *models, "dictionary"]]
        for persona in PERSONAS:
            cells = (" ".join(said[persona, model].split()) for model in models)
            rows.append([persona, *cells, own.get((question, persona), "")])
        parts.append(folded(question, table(rows), opened=number < 3))
    with replacing(root / "page.html") as file:
        file.write(document(TITLE, parts))


def _records(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
