"""The corpus of the KL-flow example: the standard library's source, and a model whose vocabulary is so small that a
point of the simplex is cheap.

python -m examples.kl_flow.corpus writes train.jsonl, validation.jsonl and a small Qwen3 without weights."""

import argparse
import sys
import sysconfig
from pathlib import Path

from examples.dictionary_styles.make_model import make_model
from examples.stdlib_cpt.corpus import texts, write_corpus

VOCABULARY = 512


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="corpus", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of source code (%(default)s; all is about 12)")
    parser.add_argument(
        "--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="whose source (Python's)"
    )
    args = parser.parse_args(arguments)
    try:
        counts = write_corpus(args.library, args.output, args.megabytes)
        make_model(texts(args.output / "train.jsonl"), args.output / "model", VOCABULARY)
    except (ValueError, OSError) as error:
        print(f"corpus: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {counts['train']} modules to train on, {counts['validation']} for validation, and a model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
