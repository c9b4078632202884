"""Replies that exist already, from any trainer's models: records of `generate`, of vLLM, of an API.

The texts go to a temporary file as they are read. In memory remains where each reply lies, some hundred bytes; a
prompt's replies are read back when it is scored.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from megatron_sfr.data.chat.conversation import check_text
from megatron_sfr.data.chat.turn_forms import plain_turns
from megatron_sfr.evaluation.compare.questions import Answered, sorted_temperatures
from megatron_sfr.evaluation.generate.prompts import Asked, NamedPrompt, Prompt, prompt_from
from megatron_sfr.evaluation.generate.sampling import setting_of
from megatron_sfr.evaluation.generate.thinking import without_empty_thought
from megatron_sfr.storage.jsonl import read_records
from megatron_sfr.storage.user_files import is_finite, parse_json, shown

TEXT = ("text", "reply", "response", "completion", "generations", "outputs", "choices")
FORM = 'write {"prompt": "...", "text": "..."}, and optionally persona, model, temperature and sample'
Cell = tuple[str, str | None]  # name of the shared prompt, persona
Place = tuple[int, int, float | None]  # offset and length in the temporary file, utility


@dataclass(frozen=True)
class Reply:
    """What one record says."""

    prompt: Prompt
    texts: Sequence[str]
    """One, or several samples of one request."""
    model: str | None
    temperature: float | None
    sample: int | None
    utilities: Sequence[float | None]
    """Of each text."""


class ReplyFiles:
    """The replies of several models, found by model, temperature, prompt and persona."""

    def __init__(self, texts: IO[bytes]) -> None:
        """texts: an empty file, open to be read and written."""
        self._texts = texts
        self._end = 0
        self._prompts: dict[Cell, Prompt] = {}
        self._places: dict[str, dict[float | None, dict[Cell, list[Place]]]] = {}
        self._samples: dict[tuple[str, float | None, Cell], set[int]] = defaultdict(set)
        self.replies = 0

    def read(self, name: str | None, path: Path, persona_as: str = "system") -> None:
        """Adds a file. name: its model; None takes each record's, or the file's name where a record has none.

        Raises:
            ValueError: `file:line: reason`, for a record without prompt or text, or a sample that was read before.
        """
        before = self.replies
        with tqdm(desc=path.name, unit=" replies", dynamic_ncols=True, leave=False) as bar:
            for record in read_records(path):
                try:
                    bar.update(self._add(reply_from(parse_json(record.text), persona_as), name, path))
                except ValueError as error:
                    raise ValueError(f"{record.source}:{record.line}: {error}") from error
        if self.replies == before:
            raise ValueError(f"{path} has no replies; {FORM}")

    def _add(self, reply: Reply, name: str | None, path: Path) -> int:
        model = name or reply.model or path.name.partition(".")[0]
        cell = (reply.prompt.shared, reply.prompt.persona)
        known = self._prompts.setdefault(cell, reply.prompt)
        if known.question != reply.prompt.question:
            raise ValueError(f"the prompt {shown(cell[0])} has two questions; give each question a separate prompt")
        drawn = self._samples[model, reply.temperature, cell]
        if reply.sample in drawn:
            raise ValueError(
                f"sample {reply.sample} of this prompt by {shown(model)} was read before; give each file once"
            )
        if reply.sample is not None:
            drawn.add(reply.sample)
        places = self._places.setdefault(model, {}).setdefault(reply.temperature, {}).setdefault(cell, [])
        for text, utility in zip(reply.texts, reply.utilities, strict=True):
            content = without_empty_thought(text).encode()
            self._texts.write(content)
            places.append((self._end, len(content), utility))
            self._end += len(content)
        self.replies += len(reply.texts)
        return len(reply.texts)

    def asked(self, references: Sequence[Asked] = ()) -> list[Asked]:
        """The prompts with replies: in their order of appearance, or those of the references, in their order.

        Raises:
            ValueError: none of the references has a reply.
        """
        if not references:
            return [Asked(prompt) for prompt in self._prompts.values()]
        found = [entry for entry in references if (entry.prompt.shared, entry.prompt.persona) in self._prompts]
        if not found:
            example = shown(next(iter(self._prompts.values())).question)
            raise ValueError(
                f"no prompt of --data has a reply, for example {example}; give the file of these prompts, with the "
                "same personas"
            )
        return found

    def outside(self, asked: Sequence[Asked]) -> int:
        """Pairs of prompt and persona with replies that are not among these."""
        return len(self._prompts.keys() - {(entry.prompt.shared, entry.prompt.persona) for entry in asked})

    def answered(self, asked: Sequence[Asked]) -> list[Answered]:
        """Every model's replies to these prompts, in order of appearance; utilities if all replies have one."""
        self._texts.flush()
        cells = [(entry.prompt.shared, entry.prompt.persona) for entry in asked]
        models = []
        for name, sweep in self._places.items():
            temperatures = sorted_temperatures(sweep)
            places = [[sweep[t].get(cell, []) for cell in cells] for t in temperatures]
            replies = [_Texts(self._texts, rows) for rows in places]
            models.append(Answered(name, tuple(temperatures), replies, utilities=_utilities(places)))
        if any(model.utilities is None for model in models):
            models = [replace(model, utilities=None) for model in models]
        return models


def _utilities(places: Sequence[Sequence[Sequence[Place]]]) -> list[list[list[float]]] | None:
    """By temperature, entry and sample; None if some reply has no utility."""
    found = [[[utility for _, _, utility in row if utility is not None] for row in rows] for rows in places]
    kept, read = (sum(len(row) for rows in every for row in rows) for every in (found, places))
    return found if kept == read else None


class _Texts(Sequence[Sequence[str]]):
    """The replies of each entry of `asked`, read from the temporary file when they are asked for."""

    def __init__(self, file: IO[bytes], places: Sequence[Sequence[Place]]) -> None:
        self._file, self._places = file, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: Any) -> Any:
        return [self._read(offset, length) for offset, length, _ in self._places[i]]

    def _read(self, offset: int, length: int) -> str:
        self._file.seek(offset)
        return self._file.read(length).decode()


@contextmanager
def reply_files(files: Mapping[Path, str | None], persona_as: str = "system") -> Iterator[ReplyFiles]:
    """Reads files of replies, each with the name of its model or None (see `ReplyFiles.read`)."""
    with tempfile.TemporaryFile() as texts:
        found = ReplyFiles(texts)
        for path, name in files.items():
            found.read(name, path, persona_as)
        yield found


def reply_from(fields: Any, persona_as: str = "system") -> Reply:
    """The reply of a record.

    The text is in one of TEXT (one, or a list), or in the last turn of `messages`. The prompt is in `prompt` or
    `messages`; with `question` beside it, `prompt` is only a name, as `generate` writes it.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"not a reply; {FORM}")
    if "resps" in fields:
        fields = _harness_sample(fields)
    if fields.get("custom_id") is not None and all(fields.get(name) is None for name in ("prompt", "messages")):
        raise ValueError(f"the output of the batch's request {shown(fields['custom_id'])}, without its prompt; {FORM}")
    names = [name for name in TEXT if fields.get(name) is not None]
    if len(names) > 1:
        raise ValueError(f"two texts ({names[0]} and {names[1]}); keep one of them")
    texts = fields[names[0]] if names else _last_turn(fields)
    texts = [_text_of(text) for text in (texts if isinstance(texts, list) else [texts])]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no text of a reply; {FORM}")
    for text in texts:
        check_text(text, "the reply")
    (model, temperature), sample = setting_of(fields), fields.get("sample")
    if sample is not None and type(sample) is not int:
        raise ValueError(f"the sample is {shown(sample)}; give a whole number, or leave it out")
    return Reply(_prompt(fields, persona_as), texts, model, temperature, sample, _utility(fields, len(texts)))


def _text_of(item: Any) -> Any:
    """A text, also of a choice of OpenAI's API or an output of vLLM."""
    if not isinstance(item, dict):
        return item
    message = item.get("message")
    return message.get("content") if isinstance(message, dict) else item.get("text")


def _harness_sample(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Prompt and texts of a sample that lm-evaluation-harness has logged."""
    requests, replies = fields.get("arguments"), fields["resps"]
    first = requests.get("gen_args_0") if isinstance(requests, dict) else None
    if isinstance(requests, list) and requests and isinstance(requests[0], list):  # of older versions
        first = dict(zip(["arg_0"], requests[0], strict=False))
    prompt = first.get("arg_0") if isinstance(first, dict) else None
    if not isinstance(prompt, str) or not isinstance(replies, list) or len(replies) != 1:
        raise ValueError(f"a sample of lm-eval without one generated reply; {FORM}")
    return {"prompt": prompt, "text": replies[0]}


def _utility(fields: Mapping[str, Any], texts: int) -> list[float | None]:
    """The utility of each text: a number for one text, a list for a list."""
    given = fields.get("utility")
    listed = given if isinstance(given, list) else [given] * (texts if given is None else 1)
    if len(listed) != texts or not all(utility is None or is_finite(utility) for utility in listed):
        raise ValueError(f"the utility is {shown(given)}; give a number for each text, or leave it out")
    return listed


def _prompt(fields: Mapping[str, Any], persona_as: str) -> Prompt:
    if fields.get("question") is None:
        return prompt_from(fields, persona_as)
    question, name, persona = (fields.get(key) for key in ("question", "prompt", "persona"))
    if not isinstance(question, str) or not isinstance(name, str) or not isinstance(persona, str | None):
        raise ValueError("question, prompt (a name of it) and persona have to be text")
    return NamedPrompt((("user", question),), persona, name)


def _last_turn(fields: Mapping[str, Any]) -> Any:
    """The text of an assistant's turn at the end of messages."""
    turns = fields.get("messages")
    last = plain_turns(turns)[-1] if isinstance(turns, list) and turns else None
    return last.get("content") if isinstance(last, dict) and last.get("role") == "assistant" else None
