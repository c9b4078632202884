"""The model to train: a BPE tokenizer made from the training text, and the config of a small Qwen3.

python -m examples.dictionary_styles.make_model writes a Hugging Face folder with everything but weights."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

VOCABULARY = 8192
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}  # 5 million parameters with that vocabulary; model.yaml says the same in Megatron's words


def texts(path: Path) -> Iterator[str]:
    """Everything that is said in a file of conversations, personas included."""
    with open(path, encoding="utf-8") as file:
        for record in map(json.loads, file):
            yield record["persona"]
            yield from (message["content"] for message in record["messages"])


def make_model(text: Iterable[str], output: Path, vocabulary: int = VOCABULARY) -> None:
    """Writes tokenizer and config to a folder; ValueError for a text too short for the vocabulary."""
    from transformers import GenerationConfig, Qwen3Config

    from megatron_sfr.demo.train_tokenizer import train_tokenizer

    tokenizer = train_tokenizer(text, vocabulary)
    if len(tokenizer) != vocabulary:
        raise ValueError(f"the text gives a vocabulary of {len(tokenizer)}, not {vocabulary}: it is too short a text")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    Qwen3Config(vocab_size=vocabulary, architectures=["Qwen3ForCausalLM"], **SHAPE, **ends).save_pretrained(output)
    GenerationConfig(do_sample=True, **ends).save_pretrained(output)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_model", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="train.jsonl, as prepare wrote it")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    args = parser.parse_args(arguments)
    try:
        make_model(texts(args.text), args.output)
    except (ValueError, OSError) as error:
        print(f"make_model: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote a tokenizer of {VOCABULARY} tokens and a Qwen3 config to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
