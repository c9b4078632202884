"""The page of `watch` from records, without a model: what it claims, and which replies it marks."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_sfr.evaluation.generate.prompts import Asked, ask
from megatron_sfr.evaluation.scores.bootstrap import Estimate
from megatron_sfr.watch.step_chart import Series, chart, short
from megatron_sfr.watch.watch_log import StepScores, WatchLog
from megatron_sfr.watch.watch_page import STEPS, Watched, page, shown_steps


def scored(step: int, saved_at: int = 0, **scores: tuple[float, float, float]) -> StepScores:
    """A step with scores as mean, low, high; `_` in a name is a hyphen."""
    named = {name.replace("_", "-"): values for name, values in scores.items()}
    means = {name: mean for name, (mean, _, _) in named.items()}
    return StepScores(step, saved_at, 1.8e9, 4, means, {name: [low, high] for name, (_, low, high) in named.items()})


def watched(*steps: StepScores, replies: dict[int, list[list[str]]] | None = None) -> Watched:
    asked = [Asked(ask("why <b>?", persona)) for persona in ("poet", "cook")]
    given = replies or {scores.step: [["a", "b"], ["a", "<i>c</i>"]] for scores in steps}
    real = {"spread": Estimate(0.5, 0.4, 0.6, 3)}
    return Watched("run", {scores.step: scores for scores in steps}, real, asked, given, "2 replies to each")


def test_a_change_is_claimed_where_the_intervals_do_not_overlap() -> None:
    first = scored(10, self_BLEU_4=(0.2, 0.1, 0.3), spread=(0.6, 0.5, 0.7), loops=(0.0, 0.0, 0.0))
    last = scored(20, self_BLEU_4=(0.8, 0.7, 0.9), spread=(0.55, 0.45, 0.65), loops=(0.3, 0.2, 0.4))
    text = page(watched(first, last))
    claims = re.findall(r"<li>(.*?)</li>", text)
    assert claims == [
        "loops rose from 0.000 [0.000, 0.000] at step 10 to 0.300 [0.200, 0.400] at step 20: worse.",
        "self-BLEU-4 rose from 0.200 [0.100, 0.300] at step 10 to 0.800 [0.700, 0.900] at step 20: less diverse.",
    ]
    assert "Nothing between the first step and the last." in page(watched(first))


def test_repeated_replies_are_marked_and_text_is_escaped() -> None:
    """A reply is repeated if any persona has given it to this prompt at this step; other steps do not count."""
    text = page(watched(scored(10), scored(20), replies={10: [["a", "b"], ["a", "c"]], 20: [["b", "<i>"], ["b", "b"]]}))
    cells = re.findall(r'<td class="reply( again)?">(.*?)</td>', text)
    poet, cook = cells[:4], cells[4:]  # each: two replies of step 10, two of step 20
    assert poet == [("", "a"), ("", "b"), ("", "b"), ("", "&lt;i&gt;")]
    assert cook == [(" again", "a"), ("", "c"), (" again", "b"), (" again", "b")]
    assert re.findall(r"(\d) of 2</td>", text) == ["2", "2", "2", "1"]
    assert "why &lt;b&gt;?" in text
    assert "why <b>" not in text


def test_at_most_twelve_steps_show_replies_with_the_first_and_the_last() -> None:
    assert shown_steps([5, 10]) == [5, 10]
    shown = shown_steps(range(10, 1010, 10))
    assert (len(shown), shown[0], shown[-1]) == (STEPS, 10, 1000)


@pytest.mark.parametrize("means", [[0.5], [0.2, 0.9], [0.0, 0.0, 0.0]])
def test_a_chart_is_well_formed_and_inside_its_frame(means: list[float]) -> None:
    steps = [10 * (i + 1) for i in range(len(means))]
    series = Series("a & b", "lower", steps, means, [(m - 0.1, m + 0.1) for m in means], real=0.4)
    figure = ElementTree.fromstring(chart(series))
    svg = figure.find("svg")
    assert svg is not None
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    points = [point.split(",") for shape in svg if "points" in shape.attrib for point in shape.attrib["points"].split()]
    assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)
    assert len(svg.findall("circle")) == len(means)
    assert svg.attrib["aria-label"].startswith("a & b: ")


@pytest.mark.parametrize(("value", "shown"), [(-1e-9, "0.00"), (0.125, "0.12"), (12.34, "12.3"), (1234.5, "1234")])
def test_axis_labels_are_short(value: float, shown: str) -> None:
    assert short(value) == shown


def test_a_damaged_record_is_named_with_its_line(tmp_path: Path) -> None:
    log = WatchLog(tmp_path, {"a": 1})
    log.write_replies(10, [], [], None)  # type: ignore[arg-type]  # without prompts no option is read
    log.add(scored(10))
    assert WatchLog(tmp_path, {"a": 1}).steps == {10: scored(10)}
    with (tmp_path / "watch.jsonl").open("a") as file:
        file.write('{"step": 20}\n')
    with pytest.raises(ValueError, match=r"watch.jsonl:2: not a record of watch; remove this line"):
        WatchLog(tmp_path, {"a": 1})
