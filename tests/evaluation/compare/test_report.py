"""The report: its claims follow from the intervals, and its files are complete or absent."""

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_sfr.evaluation.compare.curves import Curve, Loss
from megatron_sfr.evaluation.compare.frontier import Gap
from megatron_sfr.evaluation.compare.plot import draw
from megatron_sfr.evaluation.compare.report import PERSONAS, Axes, Report, summarize, verdict
from megatron_sfr.evaluation.compare.report_html import page
from megatron_sfr.evaluation.compare.tables import as_json, columns, escaped, markdown, markdown_table, terminal
from megatron_sfr.evaluation.page.reply_explorer import Explorer, ShownReply
from megatron_sfr.evaluation.scores.bootstrap import Estimate
from megatron_sfr.html import download, table
from megatron_sfr.storage.atomic import replacing

VOID = r"(?<=\w|\") (open|hidden)(?=>)|<meta[^>]*>|<!doctype html>|<img[^>]*>|<input[^>]*>|<script>.*?</script>"
GAP = Gap("CE", "SFR", "precision", "coverage", Estimate(0.02, 0.01, 0.03, 20), (0.5, 0.9))


def curve(name: str, lift: float) -> Curve:
    """Two temperatures, six prompts; no value for relevance."""
    prompts = np.linspace(-0.05, 0.05, 6)
    scores = {
        "precision": np.array([[0.9], [0.5]]) + prompts,
        "CS-SB-1": np.array([[0.6], [0.4]]) - lift + prompts,
        "relevance": np.full((2, 6), np.nan),
    }
    loss = Loss(np.full(6, 30.0), np.full(6, 20.0))
    return Curve(name, (0.5, 1.0), scores, {"held-out": loss}, {"poet": loss})


@pytest.fixture(scope="module")
def report() -> Report:
    real = {"precision": np.full(6, 1.0), "CS-SB-1": np.full(6, 0.25), "relevance": np.full(6, np.nan)}
    return summarize([curve("CE", 0.0), curve("SFR", 0.1)], [Axes("precision", "CS-SB-1")], ["A note."], real)


def test_lower_bleu_is_more_diversity(report: Report) -> None:
    [gap] = report.gaps
    assert gap.diversity == "1 − CS-SB-1"
    assert (gap.estimate.mean, gap.estimate.n) == (pytest.approx(0.1), 6)
    assert gap.range == pytest.approx((0.5, 0.9))


def test_verdicts_say_what_intervals_allow() -> None:
    assert verdict(GAP).split("): ")[1].startswith("+0.020 [+0.010, +0.030]: SFR lies higher")
    assert "at equal precision (0.50 to 0.90)" in verdict(GAP)
    assert verdict(replace(GAP, estimate=Estimate(-0.02, -0.03, -0.01, 20))).count("CE lies higher") == 1
    assert "training seed" in verdict(GAP)  # an interval over prompts knows nothing of it
    assert verdict(replace(GAP, estimate=Estimate(0.02, -0.001, 0.04, 20))).endswith("no difference beyond noise.")
    nothing = float("nan")
    assert "cannot be compared" in verdict(replace(GAP, estimate=Estimate(nothing, nothing, nothing, 20)))


def test_the_table_shows_what_has_a_value_with_its_interval(report: Report) -> None:
    text = terminal(report)
    assert "relevance" not in text
    assert f".900±{(report.scores['CE']['precision'][0].high - 0.9):.3f}".replace("±0", "±") in text
    assert "1.500±.000" in text  # the loss: 30 nats over 20 tokens
    assert "6 prompts" in text
    assert "A note." in text
    page = markdown(report, "Title", "picture.png")
    assert f"| SFR | 1 | {report.scores['SFR']['precision'][1]} | {report.scores['SFR']['CS-SB-1'][1]} |" in page
    assert "![frontiers](picture.png)" in page
    assert "| model | temperature | precision (n=6) | CS-SB-1 (n=6) |" in page
    assert "| real | - | 1.000 [1.000, 1.000] | 0.250 [0.250, 0.250] |" in page
    assert f"| CE | {math.exp(1.5):.3f} [{math.exp(1.5):.3f}, {math.exp(1.5):.3f}] |" in page  # the poet's perplexity


def test_text_from_data_is_escaped_in_the_markdown() -> None:
    """Names of personas and models come from files: GitHub renders HTML, links and images of a page."""
    hostile = "<script>alert(1)</script> [a](javascript:b) ![c](d) **e** `f` | g\n# h &lt;"
    (row,) = markdown_table([["name"], [hostile]])[2:]
    assert row == (r"| &lt;script>alert(1)&lt;/script> [a\](javascript:b) ![c\](d) \*\*e\*\* \`f\` \| g # h &amp;lt; |")
    assert escaped("self-BLEU-4 0.250 [0.200, 0.300]") == "self-BLEU-4 0.250 [0.200, 0.300]"


def test_quality_comes_before_diversity(report: Report) -> None:
    """So that no diversity is read without what it cost."""
    mixed = {name: report.scores["CE"]["precision"] for name in ("distinct-2", "coverage, far", "loops", "context")}
    assert columns(replace(report, scores={"CE": mixed})) == ["context", "loops", "coverage, far", "distinct-2"]


def test_the_page_distinguishes_what_moved_from_what_did_not(report: Report) -> None:
    moved, still = GAP, replace(GAP, estimate=Estimate(0.02, -0.01, 0.03, 20))
    reply = ShownReply("poet", "1", "CE", "<b>& so on", "cook", "<i>real", 0.5)
    text = page(
        replace(report, gaps=[still, moved]), "A <title>", b"png", Explorer([("why <i>?", [reply])], "The <first>.")
    )
    first, second = text.index("What moved beyond noise"), text.index("What did not")
    assert first < text.index("SFR lies higher") < second < text.index("no difference beyond noise")
    assert "A &lt;title&gt;" in text
    assert "&lt;b&gt;&amp; so on" in text
    assert "<summary>why &lt;i&gt;?</summary>" in text
    assert "&lt;i&gt;real" in text
    html = ElementTree.fromstring(re.sub(VOID, "", text, flags=re.DOTALL))  # every tag is closed
    rows = [["".join(cell.itertext()) for cell in row] for row in html.iter("tr")]
    assert ["real", "-", "1.000 [1.000, 1.000]", "0.250 [0.250, 0.250]"] in rows


def test_json_holds_everything_and_no_nan(report: Report) -> None:
    found = json.loads(as_json(report, {}), parse_constant=pytest.fail)
    assert found["scores"]["SFR"]["relevance"][0] == {"mean": None, "low": None, "high": None, "n": 0}
    assert found["verdicts"] == [verdict(gap) for gap in report.gaps]


def test_the_picture_has_a_panel_for_each_pair_of_axes(report: Report, tmp_path: Path) -> None:
    draw(report, tmp_path / "one.png", "One")
    draw(replace(report, axes=report.axes * 2), tmp_path / "two.png", "Two")
    widths = [int.from_bytes((tmp_path / name).read_bytes()[16:20]) for name in ("one.png", "two.png")]
    assert widths[1] == 2 * widths[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_a_file_is_complete_or_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as file:
        file.write("first")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines(["half of the sec", None])
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_the_scores_can_be_downloaded_as_csv(report: Report) -> None:
    text = page(report, "Title", None, Explorer([], ""))
    (content,) = re.findall(r'download="scores.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', text)
    head, real, *rows = csv.reader(io.StringIO(base64.b64decode(content).decode()))
    assert head == ["model", "temperature", "precision (n=6)", "CS-SB-1 (n=6)"]
    assert real[0] == "real"
    assert [row[:2] for row in rows] == [["CE", "0.5"], ["CE", "1"], ["SFR", "0.5"], ["SFR", "1"]]
    assert "Frontiers" not in text
    assert "By persona" not in text


@pytest.mark.parametrize(
    ("cell", "stored"),
    [
        ('=HYPERLINK("https://example.org";"open")', '\'=HYPERLINK("https://example.org";"open")'),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1+1", "'\t=1+1"),
        ("\r=1+1", "'\r=1+1"),
        ("\uff1d1+1", "'\uff1d1+1"),
        ("+1-cmd|' /C calc'!A0", "'+1-cmd|' /C calc'!A0"),
        ("-1+1", "'-1+1"),
        ("- milk\n- salt", "'- milk\n- salt"),
        ("-", "-"),
        ("-0.5", "-0.5"),
        ("+1e-05", "+1e-05"),
        ("-0.013 [-0.031, 0.017]", "-0.013 [-0.031, 0.017]"),
        ("I = you", "I = you"),
        ("'quoted'", "'quoted'"),
    ],
)
def test_a_text_in_csv_is_not_a_formula(cell: str, stored: str) -> None:
    content = download("a.csv", [["reply", "score"], [cell, "1"]]).split("base64,")[1].split('"')[0]
    assert list(csv.reader(io.StringIO(base64.b64decode(content).decode(), newline="")))[1] == [stored, "1"]


def test_frontiers_by_persona_are_means_over_their_prompts() -> None:
    """Of the first scores that single personas have a value for: CS-SB compares personas."""
    nothing = np.full((2, 6), np.nan)
    entries = {
        "relevance": nothing,
        "style fidelity": np.array([[0.2, 0.4, 0.6, np.nan, 0.9, 0.9], np.zeros(6)]),
        "self-BLEU-4": np.array([[0.1, 0.2, 0.6, 0.4, 0.5, 0.6], np.ones(6)]),
    }
    models = [replace(curve("CE", 0.0), entries=entries), curve("SFR", 0.1)]
    axes = [Axes("relevance", "CS-SB-1")]
    real = {"precision": np.full(6, 1.0)}
    found = summarize(models, axes, [], real, personas=["poet", "cook", "poet", "poet", "cook", "sage"]).personas
    assert found is not None
    assert (found.axes, found.has_quality, found.left_out) == (Axes("style fidelity", "self-BLEU-4"), True, 0)
    assert list(found.estimates) == ["cook", "poet", "sage"]
    ((quality, diversity), (_, collapsed)) = found.estimates["poet"]["CE"]
    assert (quality.mean, quality.n) == (pytest.approx(0.4), 2)
    assert (diversity.mean, diversity.n) == (pytest.approx(1.1 / 3), 3)
    assert found.axes.turned(collapsed).mean == 0
    assert found.estimates["poet"]["SFR"][0][1].n == 0  # it has no scores by entry
    assert summarize(models, axes, [], real, personas=["poet"] * 6).personas is None


def test_only_the_personas_with_the_most_prompts_have_frontiers() -> None:
    names = [f"{i:02}" for i in range(PERSONAS + 3) for _ in range(2 if i >= 3 else 1)]
    one = replace(curve("CE", 0.0), entries={"self-BLEU-4": np.zeros((2, len(names)))})
    found = summarize([one], [], [], {"precision": np.full(6, 1.0)}, personas=names).personas
    assert found is not None
    assert (list(found.estimates), found.left_out) == ([f"{i:02}" for i in range(3, PERSONAS + 3)], 3)
    assert not found.has_quality


def test_numbers_are_aligned_to_the_right_and_words_are_not() -> None:
    text = table([["model", "score", "text"], ["a", "0.5 [0.4, 0.6]", "1 of"], ["b", "-", "words"]])
    assert '<th>model</th><th class="n">score</th><th>text</th>' in text
    assert '<td class="n">-</td><td>words</td>' in text
