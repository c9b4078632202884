"""A code corpus that every machine has: the source of Python's standard library, and a model to train on it.

python -m examples.stdlib_cpt.corpus writes train.jsonl and validation.jsonl ({"text": ..., "path": ...}) and the folder
of a small Qwen3 with everything but weights. A file is in validation by a hash of its path."""

import argparse
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from examples.dictionary_styles.make_model import VOCABULARY, make_model

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
VALIDATION_SHARE = 0.05


def sources(library: Path) -> Iterator[tuple[str, str]]:
    """Path inside the library and text of each module, in the order of a hash of the path."""
    paths = {path.relative_to(library).as_posix(): path for path in library.rglob("*.py")}
    for name in sorted(paths, key=place):
        if not LEFT_OUT & set(Path(name).parts) and (text := paths[name].read_text(encoding="utf-8")).strip():
            yield name, text


def place(name: str) -> float:
    """Uniform in [0, 1), by the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


def write_corpus(library: Path, output: Path, megabytes: float) -> dict[str, int]:
    """Writes about this many megabytes of complete files. Returns the number of documents of each side."""
    output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"validation": [], "train": []}
    size = 0
    for name, text in sources(library):
        if size >= megabytes * 1e6:
            break
        size += len(text.encode())
        side = "validation" if place(f"side of {name}") < VALIDATION_SHARE else "train"
        rows[side].append(json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n")
    if not rows["validation"] or not rows["train"]:
        raise ValueError(f"{library} has too little source for {megabytes} MB; give more --megabytes")
    for side, lines in rows.items():
        (output / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {side: len(lines) for side, lines in rows.items()}


def texts(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from (json.loads(line)["text"] for line in file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--megabytes", type=float, default=4.0, help="of source code (%(default)s; all is about 12)")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens of the model (%(default)s)")
    parser.add_argument(
        "--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="whose source (Python's)"
    )
    args = parser.parse_args(arguments)
    try:
        counts = write_corpus(args.library, args.output, args.megabytes)
        make_model(texts(args.output / "train.jsonl"), args.output / "model", args.vocabulary)
    except (ValueError, OSError) as error:
        print(f"corpus: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {counts['train']} modules to train on, {counts['validation']} for validation, and a model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
