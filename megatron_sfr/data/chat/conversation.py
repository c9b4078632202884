"""Conversations: what a record must look like in each format, its persona, and its samples with an exact loss mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sfr.data.chat.chat_template import REASONING, ChatTemplate, TemplateRefusal
from megatron_sfr.data.chat.formats import detect, has_tool_turns, load_fields, turns_of
from megatron_sfr.data.chat.loss_mask import Supervised, as_rendered, each, together
from megatron_sfr.data.chat.rendered_turns import Turns, with_persona
from megatron_sfr.data.chat.template_options import ALL_TOGETHER, SampleOptions
from megatron_sfr.data.chat.tool_calls import Message, call_forms, check_calls
from megatron_sfr.data.chat.turn_forms import EMPTY, TRAINED, is_trained
from megatron_sfr.storage.jsonl import BadRecord, Record, RecordError, read_records
from megatron_sfr.storage.user_files import shown, strings_of

ROLES = ("system", "user", "assistant", "tool")
GROUP_CHARACTERS = 1 << 18  # of rendered text that is held at a time, or one conversation
# A field that is not here changes what a turn means: dropping it in silence would be a guess.
FIELDS = {"assistant": {"tool_calls", *REASONING}, "tool": {"name", "tool_call_id"}}


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends on an assistant turn; a persona has become its system turn where there was none.

    tools: as the chat template takes them; untrained: indices of assistant turns that are context only.
    """

    source: str
    line: int
    messages: list[Message]
    persona: str | None
    tools: list[Any] | None = None
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Encoded:
    """A sample: token ids [n] (int32), loss mask [n] (uint8, 1 = predict this token), [start, end) of trained replies.

    The last supervised token of a reply is its end-of-turn token. unlike_last, unlike_inference: as in `Supervised`.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    replies: tuple[tuple[int, int], ...]
    unlike_last: int = 0
    unlike_inference: int = 0


def read_conversations(path: Path, *, persona_as: str = "system") -> Iterator[Conversation]:
    """The conversations of a file. A bad record raises ValueError `file:line: reason`."""
    form = detect(path)
    for record in read_records(path):
        try:
            yield parse_record(record, form, persona_as=persona_as)
        except RecordError as error:
            raise ValueError(str(BadRecord(record, str(error)))) from error


def parse_record(
    record: Record, form: str = "messages", persona_key: str = "persona", *, persona_as: str = "system"
) -> Conversation:
    """The conversation of a record; RecordError says what is wrong with it."""
    fields = load_fields(record)
    turns, tools = turns_of(fields, form)
    messages = _messages(turns)
    untrained = {i for i, turn in enumerate(turns) if turn["role"] == "assistant" and not is_trained(turn)}
    for text in strings_of(tools):
        check_text(text, "a text of the tools")
    persona = fields.get(persona_key)
    if persona is not None:
        check_text(persona, f"the {persona_key}")
        if not persona.strip():
            raise RecordError(f"the {persona_key} is blank; name it, or leave the field out")
        persona = persona.strip()
    placed = with_persona(messages, persona, persona_as)
    shift = len(placed) - len(messages)
    return Conversation(record.source, record.line, placed, persona, tools, frozenset(i + shift for i in untrained))


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """Everything before the last assistant turn."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return list(messages[:last])


def encode(conversation: Conversation, tokenizer: Any) -> Encoded:
    """All replies of a conversation in one sample, with loss on what the assistant writes and on nothing else.

    Raises RecordError where no exact mask exists.
    """
    return encode_samples(conversation, tokenizer)[0]


def encode_samples(conversation: Conversation, tokenizer: Any, options: SampleOptions = ALL_TOGETHER) -> list[Encoded]:
    """The samples of a conversation in the tokenizer's chat template, in the order of their replies.

    Raises RecordError where one of them has no exact mask, or no reply is trained.
    """
    (samples,) = encode_conversations([conversation], tokenizer, options)
    if isinstance(samples, RecordError):
        raise samples
    return samples


def encode_conversations(
    conversations: Iterable[Conversation | RecordError], tokenizer: Any, options: SampleOptions = ALL_TOGETHER
) -> Iterator[list[Encoded] | RecordError]:
    """For each conversation its samples, or the error of `encode_samples`. Given errors are passed on.

    About GROUP_CHARACTERS are rendered, then all texts are encoded, then all are masked. A processor takes up to twice
    as long for the same steps if they alternate from record to record: each evicts the other's data from its caches.
    """
    group, characters = list[_Draft | RecordError](), 0
    for conversation in conversations:
        group.append(draft := _draft(conversation, tokenizer, options))
        characters += draft.characters if isinstance(draft, _Draft) else 0
        if characters >= GROUP_CHARACTERS:
            yield from _finished(group)
            group, characters = [], 0
    yield from _finished(group)


def _draft(conversation: Conversation | RecordError, tokenizer: Any, options: SampleOptions) -> _Draft | RecordError:
    if isinstance(conversation, RecordError):
        return conversation
    try:
        return _Draft(conversation, tokenizer, options)
    except RecordError as error:
        return error


def _finished(group: Sequence[_Draft | RecordError]) -> list[list[Encoded] | RecordError]:
    for draft in group:
        if isinstance(draft, _Draft):
            draft.encode()
    return [draft.samples() if isinstance(draft, _Draft) else draft for draft in group]


class _Draft:
    """A conversation on the way to its samples: rendered when it is made, then encoded, then masked."""

    def __init__(self, conversation: Conversation, tokenizer: Any, options: SampleOptions) -> None:
        """RecordError if no reply is trained."""
        self.conversation, self.options = conversation, options
        self.template = ChatTemplate(tokenizer, options)
        replies = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        wanted = replies[-1:] if options.turns == "last" or options.train_on == "last" else replies
        self.trained = [i for i in wanted if i not in conversation.untrained]
        if not self.trained:
            raise RecordError(
                'none of the replies is trained; leave out "train": false or "weight": 0, or drop the record'
            )
        given = conversation.messages
        self.forms = call_forms(given) if has_tool_turns(given) else iter([given])
        self.first = self._turns(next(self.forms))
        self.characters = 0
        if isinstance(self.first, Turns):
            self.characters = self.first.render(each=options.turns in ("each", "last"))

    def encode(self) -> None:
        if isinstance(self.first, Turns):
            self.first.encode()

    def samples(self) -> list[Encoded] | RecordError:
        """The samples, from the first form of the tool calls that the template has a use for."""
        errors: list[RecordError] = []
        for turns in chain([self.first], map(self._turns, self.forms)):
            try:
                if isinstance(turns, RecordError):
                    raise turns
                return [_encoded(sample) for sample in _samples(turns, self.options.turns)]
            except RecordError as error:
                errors.append(error)
        # That a template has no use for another form of the record says less than what it does with one that it reads.
        return next((error for error in errors if not isinstance(error, TemplateRefusal)), errors[0])

    def _turns(self, messages: Sequence[Message]) -> Turns | RecordError:
        conversation = self.conversation
        try:
            return Turns(self.template, messages, conversation.tools, self.trained, conversation.persona)
        except RecordError as error:
            return error


def _samples(turns: Turns, how: str) -> list[Supervised]:
    if how == "together":
        return [together(turns)]
    if how == "as-rendered":
        return [as_rendered(turns)]
    return [each(turns, turn) for turn in turns.trained]


def _encoded(sample: Supervised) -> Encoded:
    mask = np.zeros(len(sample.ids), np.uint8)
    for start, end in sample.spans:
        mask[start:end] = 1
    ids = np.asarray(sample.ids, np.int32)
    return Encoded(ids, mask, tuple(sample.spans), sample.unlike_last, sample.unlike_inference)


def _messages(messages: list[Any]) -> list[Message]:
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise RecordError(f"the last turn is the {roles[-1]}'s; end the conversation on an assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise RecordError("the first assistant turn answers no user turn; begin with a user turn")
    # Templates test for the fields that they know: what is null or empty is as good as absent.
    return [
        {k: v for k, v in message.items() if k == "content" or (k in _fields_of(message) and v not in (None, []))}
        for message in messages
    ]


def _fields_of(message: Message) -> set[str]:
    return {"role", "content"} | FIELDS.get(message["role"], set())


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict):
        raise RecordError(f'message {number} is not an object; write {{"role": ..., "content": ...}}')
    role = message.get("role")
    if role not in ROLES:
        raise RecordError(f"message {number} has the unknown role {shown(role)}; roles are {', '.join(ROLES)}")
    if role == "system" and number > 1:
        raise RecordError(f"message {number} is a system turn; a system turn comes first or not at all")
    known = _fields_of(message) | set(TRAINED)
    if extra := sorted(name for name, value in message.items() if name not in known and value not in EMPTY):
        raise RecordError(f"message {number} has the field {shown(extra[0])}, which is not supported; remove it")
    _check_trained(message, number)
    check_reasoning(message, number)
    content, calls = message.get("content"), message.get("tool_calls")
    if calls:
        check_calls(calls, number)
    for text in strings_of([calls, message.get("name"), message.get("tool_call_id")]):
        check_text(text, f"a text of message {number}")
    if not (calls and content is None):
        check_text(content, f"the content of message {number}")
    if role == "assistant" and not calls and not str(content).strip():
        raise RecordError(f"message {number} is an empty reply; write the reply or drop the record")


def _check_trained(message: Message, number: int) -> None:
    for name in TRAINED:
        value = message.get(name)
        if value not in (None, 0, 1):  # True and False are equal to 1 and 0
            choice = "a reply is trained or not: write 1 or 0" if name == "weight" else "write true or false"
            raise RecordError(f"message {number} has the {name} {shown(value)}; {choice}")
        if value and message["role"] != "assistant":
            raise RecordError(
                f"message {number} is the {message['role']}'s and cannot be trained; write {name} to replies"
            )


def check_reasoning(message: Message, number: int) -> None:
    """RecordError if a message has reasoning under two names, or one that is not text."""
    given = [name for name in REASONING if message.get(name) is not None]
    if len(given) > 1:
        raise RecordError(
            f"message {number} has reasoning under two names, {given[0]} and {given[1]}; keep one of them"
        )
    if given:
        check_text(message[given[0]], f"the {given[0]} of message {number}")


def check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise RecordError(f"{what} is not a string; write plain text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} has half of a surrogate pair; write the character itself") from error
