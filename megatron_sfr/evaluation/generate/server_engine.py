"""Sampling by an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or an API. `generate --server URL`.

One request asks for up to `batch_size` samples of a prompt. The random numbers are the server's; each request has a
separate seed, which servers use if they can. Nothing here imports torch.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from megatron_sfr.data.chat.chat_template import system_in_user_turn
from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.data.chat.tool_calls import Message
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions, seed_of
from megatron_sfr.evaluation.generate.server_requests import Connection, ordered
from megatron_sfr.evaluation.generate.thinking import without_empty_thought
from megatron_sfr.storage.user_files import cut, shown

Api = Literal["chat", "completions"]
OURS = ("model", "messages", "prompt", "stream", "n")  # fields that a request cannot do without
FLAGS = {  # fields that a flag sets; null leaves them out
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "max_tokens": "--max-new-tokens",
    "seed": "--seed",
}


@dataclass(frozen=True)
class Server:
    """An engine: models of a server."""

    connection: Connection
    names: Mapping[str, str]
    """The server's name of each model, by its name in records and reports."""
    api: Api = "chat"
    """chat: the server applies the model's chat template. completions: a model continues the text of the prompt."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request; null leaves out a field that is sent otherwise."""
    concurrency: int = 16
    """Requests at a time."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; give at least 1")
        for name, value in self.fields.items():
            if name in OURS:
                raise ValueError(f"--server-args: {name} is set by the command; leave it out")
            if name in FLAGS and value is not None:
                raise ValueError(f"--server-args: give {name} by {FLAGS[name]}, or null to send none")

    @property
    def models(self) -> Sequence[str]:
        return list(self.names)

    @property
    def shares_randomness(self) -> bool:
        return False

    def check(self) -> None:
        """The first request tells what is wrong."""

    def identity(self) -> dict[str, object]:
        server = {"url": self.connection.url, "api": self.api, "args": dict(self.fields)}
        return {"models": dict(self.names), "server": server}

    def load(self, name: str, template: TemplateOptions) -> str:
        """The server's name of the model."""
        return self.names[name]

    def sample(
        self, model: str, prompts: Sequence[Prompt], options: SamplingOptions, *, start: int = 0
    ) -> Iterator[tuple[int, Sampled]]:
        """As in `Engine`, in the order of the prompts. Memory holds the replies of a few requests per thread."""
        each = samples_per_request(options)
        requests = [
            (p, first, min(each, options.samples - first))
            for p in range(len(prompts))
            for first in range(0, options.samples, each)
            if p * options.samples + first >= start
        ]
        for prompt in prompts if self.api == "completions" else ():
            text_of(turns_of(prompt, options))  # refused before the first request
        connection = replace(self.connection, stopped=threading.Event())

        def work(request: tuple[int, int, int]) -> list[tuple[int, Sampled]]:
            p, first, count = request
            return [(p, reply) for reply in self._replies(connection, model, prompts[p], options, first, count)]

        try:
            for replies in ordered(requests, work, self.concurrency):
                yield from replies
        finally:
            connection.stopped.set()

    def kept(self, done: int, options: SamplingOptions) -> int:
        """Complete requests."""
        return done - done % options.samples % samples_per_request(options)

    @property
    def gives_losses(self) -> bool:
        return False

    def _replies(
        self, connection: Connection, model: str, prompt: Prompt, options: SamplingOptions, first: int, count: int
    ) -> list[Sampled]:
        """Samples first, first + 1, ... of a prompt; asks again if the server gives fewer at a time."""
        path = "chat/completions" if self.api == "chat" else "completions"
        found: list[Sampled] = []
        while len(found) < count:
            at = first + len(found)
            body = self._body(model, prompt, options, at, count - len(found))
            found += connection.ask(path, body, partial(replies_from, first=at))[: count - len(found)]
        return found

    def _body(self, model: str, prompt: Prompt, options: SamplingOptions, first: int, count: int) -> dict[str, object]:
        turns = turns_of(prompt, options)
        given = {"messages": turns} if self.api == "chat" else {"prompt": text_of(turns)}
        body = {
            "model": model,
            **given,
            "n": count if count > 1 else None,  # some servers know no n
            "temperature": options.temperature,
            "top_p": options.top_p if options.top_p < 1 else None,
            "top_k": options.top_k or None,
            "max_tokens": options.max_new_tokens,
            "seed": seed_of(options.seed, prompt, first),
        }
        return {name: value for name, value in {**body, **self.fields}.items() if value is not None}


def samples_per_request(options: SamplingOptions) -> int:
    """Greedy samples are equal, and vLLM refuses more than one."""
    return min(options.batch_size, options.samples) if options.temperature else 1


def turns_of(prompt: Prompt, options: SamplingOptions) -> list[Message]:
    """The turns as the server gets them."""
    turns = prompt.turns()
    return system_in_user_turn(turns) if options.template.persona_as == "user" else turns


def text_of(turns: Sequence[Message]) -> str:
    """The text that a base model continues. Raises ValueError for more than one turn."""
    if len(turns) > 1:
        raise ValueError(
            f"the prompt {shown(turns[-1]['content'])} has {len(turns)} turns; --server-api completions continues one "
            "text: leave the others out, and for a persona give --persona-as user or field"
        )
    return turns[0]["content"]


def replies_from(answer: Any, first: int = 0) -> list[Sampled]:
    """The replies of a server's answer, numbered from `first`. Raises ValueError if it has none, or another shape."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"an answer without choices: {shown(answer)}")
    usage = answer.get("usage")
    total = usage.get("completion_tokens") if isinstance(usage, dict) else None
    length = total if len(choices) == 1 and type(total) is int else None
    return [_reply(choice, first + i, length) for i, choice in enumerate(choices)]


def _reply(choice: Any, sample: int, length: int | None) -> Sampled:
    if not isinstance(choice, dict):
        raise ValueError(f"a choice that is not an object: {shown(choice)}")
    message = choice.get("message", choice)  # completions have the text in the choice
    content = (message.get("content") or message.get("text") or "") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise ValueError(f"a choice without text: {shown(choice)}")
    logprobs = token_logprobs(choice.get("logprobs"))
    text = without_empty_thought(content.encode(errors="replace").decode())  # JSON can hold half of a surrogate pair
    return Sampled(
        sample,
        text,
        (),
        sum(logprobs) if logprobs else None,
        choice.get("finish_reason") != "length",
        len(logprobs) if logprobs else length,
    )


def token_logprobs(logprobs: Any) -> list[float]:
    """ln p of each token, in the form of chat or of completions; empty if the server sent none."""
    if not isinstance(logprobs, dict):
        return []
    content = logprobs.get("content")
    values = [t.get("logprob") if isinstance(t, dict) else None for t in content] if isinstance(content, list) else None
    values = logprobs.get("token_logprobs") if values is None else values
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        return []
    return values


def served_models(connection: Connection) -> list[str]:
    """Names of the models that a server offers."""

    def names(answer: Any) -> list[str]:
        models = answer.get("data") if isinstance(answer, dict) else None
        ids = [model.get("id") for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        found = [name for name in ids if isinstance(name, str)]
        if not found:
            raise ValueError(f"no list of models: {shown(answer)}")
        return found

    return connection.ask("models", None, names)


def only_model(connection: Connection) -> str:
    """The model of a server that offers one. Raises ValueError with the names of several."""
    found = served_models(connection)
    if len(found) > 1:
        names = cut(", ".join(found), 300)
        raise ValueError(f"{connection.url} offers {len(found)} models; choose with --server-model: {names}")
    return found[0]
