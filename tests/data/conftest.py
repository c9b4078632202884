"""A real byte-level BPE tokenizer made on the spot, for the data tests."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sfr.data.targets.encoder import Encoder
from tests.data.records import CHATML


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    """Merges words, and runs of line ends, as the tokenizers of real models do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|channel|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the sea is blue and the sky is grey\n\n\n\nyes"] * 9, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """A folder with the tokenizer and this chat template; its end-of-turn token is its padding token too."""

    def make(template: str | None = CHATML) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            bos_token="<|endoftext|>",
            additional_special_tokens=["<|im_start|>", "<|channel|>"],
        )
        fast.chat_template = template
        fast.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(make_tokenizer) -> Path:
    return make_tokenizer()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that an encoder of this process is given."""
    seen: list[str] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: (seen.extend(texts), encode(self, texts))[1])
    return seen
