"""Validation by set and by persona: every conversation counts once, and layouts give equal numbers."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_sfr.data.prepared.conversations import PreparedData
from megatron_sfr.training.persona_metrics import NAMES

from . import tiny
from .launch import read_metrics
from .runs import Runs, begin_with
from .settings import PP2, TP2

pytestmark = pytest.mark.distributed
LAYOUTS = {
    "single": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "cp2": (2, ("--context-parallel-size", "2")),
}
SETS = {"odd": 7, "more": 12}  # conversations: two data-parallel ranks do not divide 7


def trained(runs: Runs, layout: str) -> Path:
    """Two steps without SFR from the same weights, and validation after each."""
    ranks, flags = LAYOUTS[layout]
    folders = [str(runs.once(f"valid-{n}", lambda path, n=n: tiny.write_conversations(path, n))) for n in SETS.values()]
    sets = ("--valid-data-path", *(f"{folder}/prepared" for folder in folders), "--validation-set-names", *SETS)
    often = ("--full-validation", "--multiple-validation-sets", "--eval-interval", "1", "--train-iters", "2")
    often = (*often, "--global-batch-size", "8")  # which holds every persona
    board = ("--wandb-project", "tiny", "--wandb-exp-name", layout) if layout == "single" else ()
    start = begin_with(runs.backbone())
    return runs.train(f"sets-{layout}", ranks, *start, *sets, *often, *board, *flags, recipe=runs.plain)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def tokens_by_persona(folder: Path) -> dict[str, int]:
    """Supervised tokens of a prepared folder."""
    data, counts = PreparedData.open(folder), Counter[str]()
    for sample in map(data.__getitem__, range(len(data))):
        counts[sample.persona] += int(sample.loss_mask[1:].sum())
    return dict(counts)


def test_each_set_is_read_once_and_its_personas_make_up_its_means(runs: Runs) -> None:
    records = read_metrics(trained(runs, "single"))
    for name, n in SETS.items():
        tokens = tokens_by_persona(runs.folder / f"valid-{n}" / "prepared")
        for record in records:
            table = record[f"by persona validation-{name}"]
            assert {persona: metrics["tokens"] for persona, metrics in table.items()} == tokens
            assert record[f"tokens validation-{name}"] == sum(tokens.values())
            for metric in NAMES:
                mean = sum(table[persona][metric] * tokens[persona] for persona in tokens) / sum(tokens.values())
                assert record[f"{metric} validation-{name}"] == pytest.approx(mean, rel=1e-5)
    assert 0 < records[0]["token entropy"] < 6.3  # ln 501 = 6.2
    assert set(records[0]["by persona"]) == {"voice 0", "voice 1", "voice 2"}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_layouts_give_equal_numbers(runs: Runs, layout: str) -> None:
    one, other = (read_metrics(trained(runs, name)) for name in ("single", layout))
    for expected, actual in zip(one, other, strict=True):
        tables = [name for name in expected if name.startswith("by persona")]
        assert tables == ["by persona", "by persona validation-odd", "by persona validation-more"]
        for table in tables:
            assert actual[table].keys() == expected[table].keys()
            for persona, metrics in expected[table].items():
                assert actual[table][persona] == pytest.approx(metrics, rel=1e-5), (table, persona)
        for metric in (*NAMES, "tokens"):
            for name in SETS:
                tag = f"{metric} validation-{name}"
                assert actual[tag] == pytest.approx(expected[tag], rel=1e-5)


def test_the_metrics_are_in_upstreams_wandb_run(runs: Runs) -> None:
    """Offline: the run's own file has the names of what was logged."""
    (file,) = (trained(runs, "single") / "wandb").glob("**/run-*.wandb")
    written = file.read_bytes()
    for tag in ("token entropy validation-odd", "lm loss validation-more by persona/voice 0", "token accuracy"):
        assert tag.encode() in written, tag
