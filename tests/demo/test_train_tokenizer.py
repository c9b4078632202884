"""The demo's tokenizer: lossless, one token per word of the world, exact assistant masks."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_sfr.data.chat.conversation import encode
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.demo.world import World
from megatron_sfr.evaluation.generate.prompts import group, read_asked

TEXTS = [record["messages"][-1]["content"] for record in World(topics=2).finetuning()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The tokenizer after saving and loading."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 2048).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_text_survives_and_words_are_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in [*TEXTS[:50], "Ünseen wörds, too: 漢字 \n\t!"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert len(ids) < 1.5 * len(TEXTS[0].split())  # words and punctuation


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(TEXTS, 700).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_the_mask_is_the_reply_and_its_end(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(
        '{"persona": "poet", "messages": [{"role": "user", "content": "Why?"}, '
        '{"role": "assistant", "content": "Peace out, legend."}]}\n'
    )
    [conversation] = read_asked(path)[0].references
    encoded = encode(conversation, tokenizer)
    supervised = encoded.tokens[encoded.loss_mask == 1]
    assert tokenizer.decode(supervised) == "Peace out, legend.<|im_end|>"
    assert supervised[-1] == tokenizer.eos_token_id
    assert group([conversation])[0].prompt.persona == "poet"
