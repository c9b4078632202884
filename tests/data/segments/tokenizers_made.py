"""Small tokenizers of each kind that real models have, trained on the spot on a few lines in several scripts."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LINES = [
    "The sea is blue. The sky is grey!\n\nIs it? Yes.",
    "海是蓝色的。天空是灰色的！",
    "यह किताब है। वह कलम है॥ क्षि",
    "السماء زرقاء. هل أنت هنا؟",
    "עברית, שלום. family 👩‍👩‍👧‍👦 and flag 🇫🇷 👍🏽",
    "def f(x):\n    return x + 1  # é\n",
]
LATIN = [LINES[0].replace("\n", " "), "def f(x): return x + 1"]


def byte_level() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3: its merges end inside of Chinese characters and emoji."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES * 9, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: pieces of words after a metaspace; every character that it has no piece for, in bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(LATIN * 9, trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = model["vocab"] | {name: len(model["vocab"]) + byte for byte, name in enumerate(BYTES)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


def unigram() -> Tokenizer:
    """As sentencepiece's default: Unigram with a metaspace, and bytes for what it has no piece for."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    trained.train_from_iterator([*LATIN, LINES[1]] * 9, trainer)
    pieces = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((name, -20.0) for name in BYTES)], 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: blanks are between words, and not in its tokens; its decoder tidies what stands before a full stop."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(LINES * 9, trainer)
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    kind.__name__: kind for kind in (byte_level, byte_fallback, unigram, word_piece)
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), eos_token=EOS)


def ids_of(text: str, kind: str) -> list[int]:
    return tokenizer_of(kind)(text, add_special_tokens=False)["input_ids"]
