"""A document as parts, written once, and rendered twice: as Markdown for terminals and reviews, as one HTML page.

Every part is a value of one of four kinds. A renderer knows how each looks and nothing of what it says, so what the
two files say cannot differ. Markdown turned into HTML by a library was rejected: it would draw no charts, and let the
texts of a data set through as markup.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitune.reporting import page


@dataclass(frozen=True)
class Paragraph:
    """A text; `lead` stands before it in bold, or alone."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under their heads, of texts, numbers and None; a table without heads has names to the left."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Code:
    """Lines that count as they are: a command, an answer. `language` colours it; `folded` hides it behind a title."""

    text: str
    language: str = ""
    folded: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines of (x, y) points by name; `picture` is the file that Markdown shows, "" where there is none."""

    title: str
    series: dict[str, list[tuple[float, float]]]
    x_label: str
    y_label: str
    log_y: bool = False
    picture: str = ""


Part = Paragraph | Table | Code | Chart


@dataclass(frozen=True)
class Section:
    """A title and what stands under it; one without parts is left out."""

    title: str
    parts: Sequence[Part]


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the document as Markdown; texts of data stand in it as text, not as markup."""
    blocks = [f"# {_plain(title)}"]
    for section in sections:
        blocks += [f"## {_plain(section.title)}"] * bool(section.parts) + [_markdown(part) for part in section.parts]
    return "\n\n".join(block for block in blocks if block) + "\n"


def html(title: str, sections: Sequence[Section]) -> str:
    """Return the document as one self-contained page."""
    parts = []
    for section in sections:
        parts += [page.heading(section.title)] * bool(section.parts) + [_html(part) for part in section.parts]
    return page.page(title, parts)


def _plain(text: Any) -> str:
    """Return text that Markdown shows as it is on one line; control characters are shown escaped."""
    line = " ".join(page.number(text).split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return shown.replace("<", "&lt;").replace("|", "\\|")


def _markdown(part: Part) -> str:
    if isinstance(part, Paragraph):
        return ": ".join([f"**{_plain(part.lead)}**"] * bool(part.lead) + [_plain(part.text)] * bool(part.text))
    if isinstance(part, Table):
        lines = [part.head, ["---"] * len(part.head), *part.rows]
        return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)
    if isinstance(part, Code):
        text = page.visible(part.text)
        if part.language:
            return f"```{part.language}\n{text}\n```"
        return (f"{part.folded}:\n\n" if part.folded else "") + "\n".join(f"    {line}" for line in text.splitlines())
    return f"![{_plain(part.title)}]({part.picture})" if part.picture else ""


def _html(part: Part) -> str:
    if isinstance(part, Paragraph):
        lead = [f"<strong>{page.escape(part.lead)}</strong>"] * bool(part.lead)
        return f"<p>{': '.join(lead + [page.escape(part.text)] * bool(part.text))}</p>"
    if isinstance(part, Table):
        return page.table(part.head, part.rows)
    if isinstance(part, Code):
        shown = page.preformatted(part.text)
        return page.folded(part.folded, shown) if part.folded else shown
    return page.chart(part.title, part.series, part.x_label, part.y_label, log_y=part.log_y)
