"""Self-contained HTML pages: one file with its style and drawings inside, which asks nothing of any network.

A page is a title and parts; each part is a string of HTML made by a function here. All text is escaped where it enters,
so a row of data cannot become markup. Drawings are inline SVG: they are sharp at every size, can be read by a program,
and need no library. A drawing library was rejected: its pictures are many times as large, or it is fetched by the page.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 240, 64, 40  # of a drawing, in the units of its own coordinates
COLOURS = ("#0b6bb8", "#c2561a", "#2a8a57", "#8a4fa8", "#8a6d00", "#5a6472")  # apart for the colour-blind too
_JOINERS = "\u200c\u200d"  # of Persian words and of emoji: not printable by themselves, but part of what is
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1a1d21, #e6e8ea); --paper: light-dark(#fff, #16181b);
  --line: light-dark(#d5d9de, #3a3f45); --soft: light-dark(#f3f5f7, #212428); --mark: light-dark(#0b6bb8, #6db3ef); }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1.05rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft);
  padding: .6rem .8rem; border-radius: .3rem; margin: .4rem 0; } figure { margin: 1rem 0; }
figcaption { font-weight: 600; } svg { width: 100%; max-width: 48rem; height: auto; } svg text { fill: var(--ink);
  font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--line); } a { color: var(--mark); }
"""


def visible(text: Any) -> str:
    """Return text whose characters without a shape show as `\\x00`, `\\u202e`; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" or c in _JOINERS else ascii(c)[1:-1] for c in str(text))


def escape(text: Any) -> str:
    """Return text that stands in HTML as it is, made `visible`."""
    return html.escape(visible(text))


def page(title: str, parts: Iterable[str], *, style: str = "", script: str = "") -> str:
    """Return a whole page; `parts` are HTML, `style` and `script` are ours and go in as they are."""
    code = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n{code}</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def prose(text: str) -> str:
    """Return paragraphs, of a text with empty lines between them."""
    return "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in text.split("\n\n"))


def preformatted(text: str) -> str:
    """Return a text whose lines and spaces count: an answer of a model, a command."""
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, inner: str) -> str:
    """Return HTML that shows on a click on its summary."""
    return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers stand to the right and are written as `number` has them, None as nothing."""
    rows = [list(row) for row in rows]
    numeric = [
        any(_is_number(row[i]) for row in rows) and all(row[i] is None or _is_number(row[i]) for row in rows)
        for i in range(len(head))
    ]
    kinds = [' class="number"' * right for right in numeric]
    lines = ["".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))]
    lines += [
        "".join(f"<td{kind}>{escape(number(cell))}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def number(value: Any) -> str:
    """Return a value as a table has it: 12,345, four significant digits of a float, yes or no, "" for None."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        whole = math.isfinite(value) and 1000 <= abs(value) < 1e12
        return f"{value:,.0f}" if whole else f"{value:.4g}"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def histogram(title: str, bins: Sequence[tuple[int | float | str, int | float | str, int]], unit: str = "") -> str:
    """Return a drawing of counts: bins are (from, to, count), or (name, name, count) for kinds."""
    top = max((count for _, _, count in bins), default=0)
    if not top:
        return _figure(title, "", "nothing to show")
    shapes, high = _frame(0, top, None, None, unit)
    step = (WIDTH - LEFT) / len(bins)
    each = -(-len(bins) // 8)  # every which bin is labelled
    for i, (low, end, count) in enumerate(bins):
        x, height = LEFT + i * step, _up(count, 0, high)
        name = number(low) if low == end else f"{number(low)} to {number(end)}"
        shapes.append(
            f'<rect x="{x + 1:.1f}" y="{height:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{HEIGHT - BOTTOM - height:.1f}" fill="{COLOURS[0]}">'
            f"<title>{escape(name)}: {count:,}</title></rect>"
        )
        if i % each == 0:
            shapes.append(_label(x + step / 2, HEIGHT - BOTTOM + 16, escape(number(low))))
    return _figure(title, "".join(shapes), f"{len(bins)} bars, the highest {top:,}")


def chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Return a drawing of lines: points (x, y) by name; points that are not finite are left out.

    `bands` holds (x, low, high) by the same names. A logarithmic axis leaves out what is not above 0.
    """
    lines = {name: _finite(points, log_x, log_y) for name, points in series.items()}
    areas = {name: _finite(points, log_x, log_y) for name, points in (bands or {}).items()}
    every = [point for points in (*lines.values(), *areas.values()) for point in points]
    if not every:
        return _figure(title, "", "nothing to show")
    xs, ys = [point[0] for point in every], [value for point in every for value in point[1:]]
    (left, right), (low, high) = _wide(min(xs), max(xs)), _wide(min(ys), max(ys))
    shapes, _ = _frame(low, high, left, right, y_label, x_label, log_x, log_y)

    def place(x: float, y: float) -> str:
        return f"{LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 8):.1f},{_up(y, low, high):.1f}"

    for i, (name, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        if name in areas:
            edge = [place(x, y) for x, y, _ in areas[name]] + [place(x, y) for x, _, y in reversed(areas[name])]
            shapes.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" fill-opacity="0.18"/>')
        spots = [place(*point) for point in points]
        shapes.append(f'<polyline points="{" ".join(spots)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for spot in spots if len(spots) <= 30 else ():
            x, y = spot.split(",")
            shapes.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        shapes.append(f'<rect x="{LEFT + 12 + 150 * i}" y="4" width="14" height="4" fill="{colour}"/>')
        shapes.append(_label(LEFT + 32 + 150 * i, 11, escape(name), "start"))
    return _figure(title, "".join(shapes), ", ".join(f"{name}: {len(points)} points" for name, points in lines.items()))


def _finite(points: Sequence[tuple[float, ...]], log_x: bool, log_y: bool) -> list[tuple[float, ...]]:
    """Return the points that can be drawn, as their logarithms to base 10 where the axis is logarithmic."""
    logs = [log_x, log_y, log_y]
    good = [p for p in points if all(math.isfinite(v) and (v > 0 or not log) for v, log in zip(p, logs, strict=False))]
    return [tuple(math.log10(v) if log else v for v, log in zip(p, logs, strict=False)) for p in good]


def _wide(low: float, high: float) -> tuple[float, float]:
    """Return a range with some width."""
    room = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _up(value: float, low: float, high: float) -> float:
    """Return the height of a value in the drawing, which counts downward."""
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - 20)


def ticks(low: float, high: float, about: int = 5, log: bool = False) -> list[float]:
    """Return round values within a range, apart by 1, 2 or 5 times a power of ten.

    A logarithmic range is given in logarithms to base 10, and so are the values: those of 1, 2, 5, 10, 20, ... or of
    powers of ten alone, or of equal steps where fewer than two of these lie within.
    """
    if log:
        steps = (1, 2, 5) if high - low < 2.5 else (1,)
        powers = range(math.floor(low), math.ceil(high) + 1)
        values = [power + math.log10(step) for power in powers for step in steps]
        inside = [value for value in values if low <= value <= high]
        if len(inside) > 1:
            return inside[:: -(-len(inside) // 8)]
        return [math.log10(value) for value in ticks(10.0**low, 10.0**high, about)]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(
    low: float, high: float, left: float | None, right: float | None, y_label: str = "", x_label: str = "",
    log_x: bool = False, log_y: bool = False,
) -> tuple[list[str], float]:  # fmt: skip
    """Return the axes with round values, none below where there is no range, and the top of the vertical one."""
    bottom = HEIGHT - BOTTOM
    shapes = []
    for value in ticks(low, high, log=log_y):
        y = _up(value, low, high)
        shapes.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(_label(LEFT - 6, y + 4, number(10.0**value if log_y else value), "end"))
    if left is not None and right is not None:
        for value in ticks(left, right, 6, log_x):
            x = LEFT + (value - left) / (right - left) * (WIDTH - LEFT - 8)
            shapes.append(_label(x, bottom + 16, number(10.0**value if log_x else value)))
    shapes.append(_label((LEFT + WIDTH) / 2, HEIGHT - 6, escape(x_label or y_label)))
    if x_label:
        shapes.append(f'<g transform="rotate(-90)">{_label(-(bottom / 2), 12, escape(y_label))}</g>')
    return shapes, high


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _figure(title: str, shapes: str, words: str) -> str:
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {words}")}">{shapes}</svg>'
    )
    body = drawing if shapes else f"<p>{words}</p>"
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}</figure>"
