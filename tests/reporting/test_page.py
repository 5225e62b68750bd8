"""Pages ask nothing of a network, show text as text, and draw where the numbers are."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from minitune.reporting import page as pages

HOSTILE = '<script>alert("x")</script>&amp;\x00\u202e"\' \U0001f468\u200d\U0001f469 \ud800'


class Reader(HTMLParser):
    """Collects tags and text as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_text_of_strangers_is_text():
    parts = [
        pages.heading(HOSTILE), pages.prose(HOSTILE), pages.preformatted(HOSTILE), pages.table([HOSTILE], [[HOSTILE]]),
        pages.folded(HOSTILE, ""), pages.histogram(HOSTILE, [(HOSTILE, HOSTILE, 3)], HOSTILE),
        pages.chart(HOSTILE, {HOSTILE: [(0, 1)]}, HOSTILE, HOSTILE),
    ]  # fmt: skip
    text = pages.page(HOSTILE, parts)
    text.encode()  # half a surrogate pair could not be written
    found = Reader(text)
    assert "script" not in [tag for tag, _ in found.tags]
    shown = '<script>alert("x")</script>&amp;\\x00\\u202e"\' \U0001f468\u200d\U0001f469 \\ud800'
    assert "".join(found.words).count(shown) >= 10


def test_a_page_asks_nothing_of_a_network():
    text = pages.page("t", [pages.chart("c", {"a": [(0, 1), (1, 2)]}, "x", "y"), pages.histogram("h", [(0, 1, 2)])])
    found = Reader(text)
    assert not [a for _, a in found.tags if a.keys() & {"src", "href", "srcset", "action"}]
    assert "url(" not in text and "@import" not in text
    (policy,) = [a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def drawing(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", text)[0])


def test_bars_are_as_high_as_their_counts():
    bars = [e for e in drawing(pages.histogram("h", [(0, 9, 10), (10, 19, 5), (20, 29, 0)])).iter("rect")]
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and heights[2] == 0
    assert [bar.find("title").text for bar in bars] == ["0 to 9: 10", "10 to 19: 5", "20 to 29: 0"]


def test_a_line_goes_through_its_points():
    shapes = drawing(pages.chart("c", {"a": [(0, 0), (1, 1), (3, 3), (4, float("nan"))]}, "x", "y"))
    (line,) = shapes.iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = [map(float, spot.split(",")) for spot in line.get("points").split()]
    assert (x2 - x0) == pytest.approx(3 * (x1 - x0), abs=0.3)
    assert (y0 - y2) == pytest.approx(3 * (y0 - y1), abs=0.3) and y0 > y2


def test_a_logarithmic_axis_leaves_out_what_has_no_logarithm():
    shapes = drawing(pages.chart("c", {"a": [(1, 0.0), (10, 1.0), (100, 10.0)]}, "x", "y", log_x=True, log_y=True))
    (line,) = shapes.iter("polyline")
    assert len(line.get("points").split()) == 2


@pytest.mark.parametrize("make", [lambda: pages.histogram("h", []), lambda: pages.chart("c", {"a": []}, "x", "y")])
def test_nothing_to_draw_is_said(make):
    assert "nothing to show" in make()


def test_one_point_and_equal_values_can_be_drawn():
    for points in ([(3, 0.0)], [(1, 5.0), (2, 5.0)], [(0, -1e9), (1, 1e9)]):
        assert "<polyline" in pages.chart("c", {"a": points}, "x", "y", bands={"a": [(1, 4.0, 6.0)]})


@pytest.mark.parametrize(
    "low,high,expected",
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.61, [0.2, 0.3, 0.4, 0.5, 0.6]), (-5, 5, [-4, -2, 0, 2, 4])],
)
def test_ticks_are_round(low, high, expected):
    assert pages.ticks(low, high) == expected


@pytest.mark.parametrize(
    "low,high,expected",
    [
        (30, 300, [50, 100, 200]),
        (1, 1e6, [1, 10, 100, 1e3, 1e4, 1e5, 1e6]),
        (0.62, 0.9, [0.7, 0.8, 0.9]),
    ],
)
def test_logarithmic_ticks_are_round(low, high, expected):
    assert [10**value for value in pages.ticks(math.log10(low), math.log10(high), log=True)] == pytest.approx(expected)


def test_numbers_are_written_for_readers():
    shown = [pages.number(value) for value in (None, True, 12345, 0.123456, 12345.678, float("nan"), "a")]
    assert shown == ["", "yes", "12,345", "0.1235", "12,346", "nan", "a"]


def test_columns_of_numbers_stand_to_the_right():
    text = pages.table(["name", "count"], [["a", 1], ["b", None]])
    assert text.count('class="number"') == 3 and '<td class="number"></td>' in text
