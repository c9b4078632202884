"""Panels by persona: the same axes everywhere, points where the numbers are, and names that stay text."""

import base64
import csv
import io
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_sfr.evaluation.page.persona_panels import COLOURS, DARK, SHAPES, Panels, Point, axis, section
from megatron_sfr.evaluation.scores.bootstrap import Estimate


def exact(value: float, n: int = 3) -> Estimate:
    return Estimate(value, value - 0.01, value + 0.01, n)


def point(temperature: str, x: float, y: float) -> Point:
    return Point(temperature, exact(x), exact(y))


PANELS = Panels(
    "relevance",
    "1 − self-BLEU-4",
    {
        "<poet>": {"CE": [point("0.5", 0.4, 0.7), point("1", 0.2, 0.9)], "S&R": []},
        "cook": {"CE": [point("0.5", 0.4, 0.9)], "S&R": [point("0.5", 0.3, 0.8), point("1", 0.25, 0.85)]},
    },
    "How to <read>.",
)
VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(VALUES)
@example([0.0, 1e-133])
@example([1.9])
def test_an_axis_holds_its_values_between_round_numbers(values: list[float]) -> None:
    found = axis(values)
    assert found.low < min(values) <= max(values) < found.high
    assert 2 <= len(found.ticks) <= 6
    assert all(found.low <= tick <= found.high for tick in found.ticks)
    assert len(set(found.labels)) == len(found.labels)
    assert "-0" not in found.labels


def positions(figure: ElementTree.Element) -> list[tuple[float, float]]:
    found = [re.findall(r"[\d.]+", path.get("transform", "")) for path in figure.iter("path")]
    return [(float(row[0]), float(row[1])) for row in found if row]


def test_equal_values_are_at_equal_positions_in_all_panels() -> None:
    html = ElementTree.fromstring(f"<div>{''.join(section(PANELS))}</div>")  # every tag is closed
    poet, cook = html.iter("figure")
    assert ["".join(figure.find("figcaption").itertext()) for figure in (poet, cook)] == [  # type: ignore[union-attr]
        "<poet> 3 prompts",
        "cook 3 prompts",
    ]
    (low, high), ((x, y), *_) = positions(poet), positions(cook)
    assert x == low[0] > high[0]
    assert y == high[1] < low[1]  # up is more
    assert [path.get("class") for path in poet.iter("path") if path.get("transform")] == ["first", "mark"]
    assert "CE, temperature 0.5: 0.400 [0.390, 0.410] across, 0.700 [0.690, 0.710] up" in "".join(poet.itertext())
    legend = "".join(next(p for p in html.iter("p") if p.get("class") == "legend").itertext())
    assert legend.split() == ["CE", "S&R"]


def test_the_numbers_are_there_as_csv() -> None:
    (content,) = re.findall(r'download="personas.csv" href="[^,]*,([^"]*)"', "".join(section(PANELS)))
    head, first, *rows = csv.reader(io.StringIO(base64.b64decode(content).decode()))
    assert head == ["persona", "model", "temperature", "relevance", "prompts", "1 − self-BLEU-4", "prompts"]
    assert first == ["<poet>", "CE", "0.5", "0.400 [0.390, 0.410]", "3", "0.700 [0.690, 0.710]", "3"]
    assert len(rows) == 4


def test_without_quality_temperatures_are_side_by_side() -> None:
    at = [Point(label, Estimate(i, i, i, 1), exact(0.5)) for i, label in enumerate(("-", "0.5", "2"))]
    text = "".join(section(Panels("", "distinct-2", {"": {"CE": at}, "cook": {"CE": at[:1]}}, "", ("-", "0.5", "2"))))
    poet, _ = ElementTree.fromstring(f"<div>{text}</div>").iter("figure")
    (a, _), (b, _), (c, _) = positions(poet)
    assert b - a == pytest.approx(c - b)
    assert [label.text for label in poet.iter("text")][:3] == ["-", "0.5", "2"]
    assert "no persona" in text
    assert "relevance" not in text


def test_a_model_has_its_colour_and_shape_on_both_backgrounds() -> None:
    assert len(COLOURS) == len(DARK) == len(SHAPES) == len({*COLOURS, *DARK}) // 2
