"""Makes what the study needs: dictionaries, text, tokens, targets, the common start. Existing files are kept."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from tqdm import tqdm

from examples.dictionary_styles.dictd import SOURCES, check_sources
from examples.dictionary_styles.study.work import EXAMPLE, HERE, Place, megatron_sfr
from megatron_sfr.data.targets.store import DEFAULT, STATISTICS
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import read_config
from megatron_sfr.storage.atomic import replacing
from megatron_sfr.storage.model_folders import weights_fingerprint

Step = tuple[str, Path, Callable[[], object]]
"""(name, a file that exists once the step is done, a function that does it)"""

PACKAGES = tuple(source.package for source in SOURCES)
LAST = Path(SOURCES[-1].file)  # of the package that is unpacked last
LENGTHS = ("--seq-length", 128, "--stride", 16, "--horizons", "1:64", "--min-segment-length", 8, "--skip-bad-rows")
PROMPTS = 140  # held-out headwords, those first that most dictionaries define


def prepare(place: Place) -> None:
    """Makes whatever is missing, in order. Raises ValueError if a step fails."""
    steps = [*texts(place), *(tokens_of_start(place) if place.start is None else []), *tokens(place)]
    steps.append(common_start(place) if place.start is None else ("the start's shape", place.shape, describe(place)))
    missing = [step for step in steps if not step[1].exists()]
    for name, _, make in (bar := tqdm(missing, desc="materials", unit="step", disable=not missing)):
        bar.set_postfix_str(name)
        make()


def check(place: Place, stages: tuple[str, ...]) -> None:
    """Raises ValueError if a file that these stages read is missing, where they do not make it themselves."""
    read = [place.text("train"), place.root / "wide-text" / "prompts.jsonl"]
    if "train" in stages:
        read += [place.shape, *(place.data(side) / DEFAULT / STATISTICS for side in ("train", "validation"))]
    if "score" in stages:
        read.append(place.root / "text" / "train.jsonl")
    if missing := [path for path in read if not path.exists()]:
        raise ValueError(f"{missing[0]} is missing: make it by --stages materials, or copy it from where that was done")


def claim(place: Place, stages: tuple[str, ...]) -> None:
    """Records what the study is made from. Raises ValueError if its folder has a study made from something else.

    The start is known by its weights, wherever it lies. Recipe and device are those of training and sampling.
    """
    said: dict[str, str] = {}
    if place.start is not None:
        said["model"] = weights_fingerprint(place.start.glob("*.safetensors"))
    if {"train", "sample"} & {*stages}:
        said["recipe"] = "" if place.recipe is None else place.recipe.read_text(encoding="utf-8")
        said["device"] = place.device
    path = place.study / "made_from.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if changed := [key for key in said if before.get(key, said[key]) != said[key]]:
        what = " and ".join(changed)
        raise ValueError(f"{place.study} was begun with another {what}: move that folder, or ask for the same")
    with replacing(path) as file:
        json.dump(before | said, file)


def texts(place: Place) -> list[Step]:
    root = place.root
    wide, text = root / "wide-text", root / "text"
    much = ("--max-per-persona", 40000, "--prompts", PROMPTS)
    few = place.text("train").parent
    scarce = ("--max-per-persona", place.regime.per_persona)
    return [
        ("dictionaries", root / "packages" / LAST, lambda: unpack(root / "packages")),
        ("wide text", wide / "train.jsonl", lambda: write_text(place, wide, *much)),
        ("balanced text", text / "train.jsonl", lambda: write_text(place, text)),
        *([] if few == text else [("scarce text", few / "train.jsonl", lambda: write_text(place, few, *scarce))]),
    ]


def tokens_of_start(place: Place) -> list[Step]:
    wide = place.root / "wide-text"
    return [
        ("tokenizer", place.model / "config.json", lambda: make_model(wide, place.model)),
        _tokens(place, wide / "train.jsonl", wide / "train"),
    ]


def tokens(place: Place) -> list[Step]:
    found = []
    for side in ("train", "validation"):
        words = ("embed", "--data", place.data(side), "--encoder", "minilm", "--dtype", "bfloat16")
        found.append(_tokens(place, place.text(side), place.data(side)))
        done = place.data(side) / DEFAULT / STATISTICS  # written when the store is complete; until then `embed` resumes
        found.append((f"targets of text/{side}", done, _command(place, *words)))
    return found


def _tokens(place: Place, text: Path, output: Path) -> Step:
    words = ("prepare", "--input", text, "--tokenizer", place.model, "--output", output, *LENGTHS)
    return f"tokens of {text.parent.name}/{text.stem}", output / "manifest.json", _command(place, *words)


def common_start(place: Place) -> Step:
    recipes = ("--recipe", EXAMPLE / "base.yaml", "--recipe", HERE / "base.yaml", "--sfr-backend", place.device)
    train = ("train", place.shape, *recipes)
    export = ("convert", "export", "--checkpoint", place.common, "--like", place.model, "--output", place.base)
    log = place.study / "logs" / "base.log"
    return "the common start", place.base, lambda: [megatron_sfr(log, *words) for words in (train, export)]


def describe(place: Place) -> Callable[[], object]:
    """A function that writes the start's recipe, as `megatron-sfr convert recipe` prints it."""

    def write() -> None:
        with replacing(place.shape) as file:
            yaml.safe_dump(megatron_flags(read_config(place.base)), file, sort_keys=False)

    return write


def unpack(folder: Path) -> None:
    """Downloads and unpacks Debian's packages of the dictionaries, without root."""
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
    """The threshold that `megatron-sfr calibrate-sed` finds for the common start."""
    log = place.study / "logs" / "calibrate-sed.log"
    if not log.exists() or not _threshold(log):
        words = ("--data", place.data("train"), "--top-k", 10, "--device", place.device)
        megatron_sfr(log, "calibrate-sed", "--model", place.base, *words)
    found = _threshold(log)
    assert found is not None, f"{log} names no threshold"
    return float(found[1])


def _threshold(log: Path) -> re.Match[str] | None:
    return re.search(r"^sed_threshold: (\S+)$", log.read_text(encoding="utf-8"), re.MULTILINE)


def _command(place: Place, *words: object) -> Callable[[], object]:
    return lambda: megatron_sfr(place.study / "logs" / f"{words[0]}.log", *words)


def _example(module: str, *words: object) -> None:
    command = [sys.executable, "-m", f"examples.dictionary_styles.{module}", *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"{module} failed: {found.stderr.strip().splitlines()[-1]}")
