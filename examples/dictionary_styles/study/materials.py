"""What the study stands on: dictionaries, text, tokens, targets, the common start. What is there is not made again."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from examples.dictionary_styles.dictd import check_sources
from examples.dictionary_styles.study.plan import EXAMPLE, HERE
from examples.dictionary_styles.study.work import Place, megatron_sfr

PACKAGES = (
    *("dict-gcide", "dict-wn", "dict-devil", "dict-jargon", "dict-foldoc", "dict-vera", "dict-elements"),
    "fortunes",
)
LENGTHS = ("--seq-length", 128, "--stride", 16, "--horizons", "1:64", "--min-segment-length", 8, "--skip-bad-rows")
PROMPTS = 140  # held-out headwords, those first that most dictionaries define


def prepare(place: Place) -> None:
    """Makes whatever is missing, in order; ValueError in one line where something cannot be had."""
    root, logs = place.root, place.study / "logs"
    wide, text, model = root / "wide-text", root / "text", root / "model"
    steps = [
        ("dictionaries", root / "packages" / "usr", lambda: unpack(root / "packages")),
        (
            "wide text",
            wide / "train.jsonl",
            lambda: write_text(place, wide, "--max-per-persona", 40000, "--prompts", PROMPTS),
        ),
        ("balanced text", text / "train.jsonl", lambda: write_text(place, text)),
        ("tokenizer", model / "config.json", lambda: make_model(wide, model)),
    ]
    for data in (wide / "train", text / "train", text / "validation"):
        words = ("prepare", "--input", f"{data}.jsonl", "--tokenizer", model, "--output", data, *LENGTHS)
        steps.append((f"tokens of {data.parent.name}", data / "manifest.json", _command(logs, *words)))
    for data in (text / "train", text / "validation"):
        words = ("embed", "--data", data, "--encoder", "minilm", "--dtype", "bfloat16")
        steps.append((f"targets of {data.parent.name}/{data.name}", data / "targets", _command(logs, *words)))
    train = ("train", EXAMPLE / "base.yaml", "--recipe", HERE / "base.yaml")
    export = ("convert", "export", "--checkpoint", place.study / "base", "--like", model, "--output", place.base)
    steps.append(
        ("the common start", place.base, lambda: [megatron_sfr(logs / "base.log", *w) for w in (train, export)])
    )
    missing = [step for step in steps if not step[1].exists()]
    for name, _, make in (bar := tqdm(missing, desc="materials", unit="step", disable=not missing)):
        bar.set_postfix_str(name)
        make()


def unpack(folder: Path) -> None:
    """Debian's packages of the dictionaries, unpacked without root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise ValueError(f"apt-get or dpkg is missing: unpack {', '.join(PACKAGES)} of Debian into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    found = subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, capture_output=True, text=True, check=False)
    if found.returncode:
        said = found.stderr.strip().splitlines()
        raise ValueError(f"apt-get download failed: {said[-1] if said else 'it said nothing'} (try apt-get update)")
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
    check_sources(folder)


def write_text(place: Place, output: Path, *more: object) -> None:
    given = ("--dictionaries", place.root / "packages", "--output", output, "--quiet", *more)
    _example("prepare", *given)


def make_model(text: Path, output: Path) -> None:
    _example("make_model", "--text", text / "train.jsonl", "--output", output)


def sed_threshold(place: Place) -> float:
    """What `megatron-sfr calibrate-sed` finds for the common start."""
    log = place.study / "logs" / "calibrate-sed.log"
    if not log.exists() or not _threshold(log):
        megatron_sfr(
            log, "calibrate-sed", "--model", place.base, "--data", place.root / "text" / "train", "--top-k", 10
        )
    found = _threshold(log)
    assert found is not None, f"{log} names no threshold"
    return float(found[1])


def _threshold(log: Path) -> re.Match[str] | None:
    return re.search(r"^sed_threshold: (\S+)$", log.read_text(encoding="utf-8"), re.MULTILINE)


def _command(logs: Path, *words: object):  # type: ignore[no-untyped-def]
    return lambda: megatron_sfr(logs / f"{words[0]}.log", *words)


def _example(module: str, *words: object) -> None:
    command = [sys.executable, "-m", f"examples.dictionary_styles.{module}", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"{module} failed: {found.stderr.strip().splitlines()[-1]}")
