"""Engines: what samples replies. `generate` and `evaluate` use all of them through one interface.

Imports torch only when a Hugging Face folder is loaded, so that a server can be asked without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_sfr.data.chat.template_options import TemplateOptions
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.generate.sampling import Sampled, SamplingOptions
from megatron_sfr.storage.model_folders import check_model_folder
from megatron_sfr.storage.provenance import contents_of


class Engine(Protocol):
    """Samples replies from one or several models."""

    @property
    def models(self) -> Sequence[str]:
        """Names of the models."""
        ...

    @property
    def shares_randomness(self) -> bool:
        """Whether different models draw with the same random numbers."""
        ...

    def check(self) -> None:
        """Raises ValueError if a model cannot be sampled, before any is loaded."""
        ...

    def identity(self) -> dict[str, object]:
        """What determines the replies besides prompts and sampling options."""
        ...

    def load(self, name: str, template: TemplateOptions) -> Any:
        """Loads a model; warns if its replies, written by this template, would not end."""
        ...

    def sample(
        self, model: Any, prompts: Sequence[Prompt], options: SamplingOptions, *, start: int = 0
    ) -> Iterator[tuple[int, Sampled]]:
        """Yields (index of the prompt, reply) without the first `start` replies, a number that `kept` returned."""
        ...

    def kept(self, done: int, options: SamplingOptions) -> int:
        """How many of the first `done` replies of a model a resumed run keeps."""
        ...

    @property
    def gives_losses(self) -> bool:
        """Whether a loaded model is one of which `negative_log_likelihood` computes losses."""
        ...


@dataclass(frozen=True)
class HuggingFace:
    """Hugging Face folders, sampled on this machine by transformers or vLLM."""

    folders: Mapping[str, Path]
    """By the name of the model."""
    engine: Literal["transformers", "vllm"] = "transformers"
    device: str | None = None
    """torch's name of a device; None: a GPU if there is one."""
    dtype: str = "auto"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's engine arguments."""

    @property
    def models(self) -> Sequence[str]:
        return list(self.folders)

    @property
    def shares_randomness(self) -> bool:
        return self.engine == "transformers"

    def check(self) -> None:
        for folder in self.folders.values():
            check_model_folder(folder)
        if self.arguments:
            from megatron_sfr.evaluation.generate.vllm_engine import check_arguments

            check_arguments(self.arguments)

    def identity(self) -> dict[str, object]:
        found: dict[str, object] = {
            "models": {name: contents_of(folder) for name, folder in self.folders.items() if folder.is_dir()},
            "engine": {"device": self.device, "dtype": self.dtype, "engine": self.engine},
        }
        return found | ({"vllm_args": dict(self.arguments)} if self.arguments else {})

    def load(self, name: str, template: TemplateOptions) -> Any:
        from megatron_sfr.evaluation.generate import transformers_engine, vllm_engine
        from megatron_sfr.evaluation.generate.end_token_warning import warn_of_unknown_end

        folder = self.folders[name]
        if self.engine == "vllm":
            model: Any = vllm_engine.load_model(
                name, folder, device=self.device, dtype=self.dtype, arguments=self.arguments
            )
        else:
            model = transformers_engine.load_model(name, folder, device=self.device, dtype=self.dtype)
        warn_of_unknown_end(folder, model.tokenizer, model.end_tokens, template)
        return model

    def sample(
        self, model: Any, prompts: Sequence[Prompt], options: SamplingOptions, *, start: int = 0
    ) -> Iterator[tuple[int, Sampled]]:
        from megatron_sfr.evaluation.generate import transformers_engine, vllm_engine

        engine = vllm_engine if self.engine == "vllm" else transformers_engine
        return engine.sample(model, prompts, options, start=start)

    def kept(self, done: int, options: SamplingOptions) -> int:
        """Complete batches: an incomplete batch is sampled again, with identical rounding."""
        return done - done % options.batch_size

    @property
    def gives_losses(self) -> bool:
        return self.engine == "transformers"
