"""What a golden set found, of one model or two: shares, the difference row by row, as lines and as a page.

A row that one model passes and the other does not is "fixed" or "broken"; of these McNemar's exact test asks whether
they are more than a coin's tosses (`comparison`). A row on which the judge gave no verdict of one model has no change
and is not compared: a reply that could not be read must not look like a row that got better. A page shows each row's
answers side by side, broken ones first.
"""

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from minitune.endpoint import Reply
from minitune.errors import counted
from minitune.evaluation.answers import shown_answer, shown_prompt
from minitune.evaluation.comparison import compare_right
from minitune.evaluation.golden import Checked, Row
from minitune.evaluation.metrics import wilson_interval
from minitune.reporting.page import heading, page, preformatted, prose, table, visible

CHANGES = ("broken", "fixed", "same-fail", "same-pass", "no-verdict")
SHOWN = 10  # changed rows in the terminal
_STYLE = """
.both { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.row { border-top: 1px solid var(--line); }
"""

Answered = tuple[Sequence[Reply], Sequence[Checked]]


def report(rows: Sequence[Row], tuned: Answered, base: Answered | None = None) -> dict[str, Any]:
    """Return shares with intervals, by tag too, and every row; with a base the comparison and each row's change."""
    sides = {"tuned": tuned} | ({} if base is None else {"base": base})
    found: dict[str, Any] = {"rows": len(rows)}
    for side, (_, checked) in sides.items():
        found[side] = {
            "pass_rate": _share(checked),
            "judged": sum(one.judged for one in checked), "no_verdict": sum(one.no_verdict for one in checked),
            "tags": {tag: _share([one for row, one in zip(rows, checked, strict=True) if tag in row.tags])
                     for tag in sorted({tag for row in rows for tag in row.tags})},
        }  # fmt: skip
    found["answers"] = [
        {"id": row.id, "origin": row.record.origin, "tags": list(row.tags), "prompt": shown_prompt(row.record)}
        | {side: _side(replies[i], checked[i]) for side, (replies, checked) in sides.items()}
        for i, row in enumerate(rows)
    ]
    if base is not None:
        for one in found["answers"]:
            one["change"] = _change(one["tuned"], one["base"])
        changes = [one["change"] for one in found["answers"]]
        found["changes"] = {change: changes.count(change) for change in CHANGES}
        whole = [one for one in found["answers"] if one["change"] != "no-verdict"]
        right = [[one[side]["passed"] for one in whole] for side in ("tuned", "base")]
        found["comparison"] = asdict(compare_right(*right)) if whole else None
    return found


def _change(tuned: dict[str, Any], base: dict[str, Any]) -> str:
    if tuned["no_verdict"] or base["no_verdict"]:
        return "no-verdict"
    if tuned["passed"] == base["passed"]:
        return "same-pass" if tuned["passed"] else "same-fail"
    return "fixed" if tuned["passed"] else "broken"


def _share(checked: Sequence[Checked]) -> dict[str, Any]:
    passed = sum(one.passed for one in checked)
    edges = wilson_interval(passed, len(checked))
    return {"passed": passed, "rows": len(checked), "value": passed / len(checked), "interval": list(edges)}


def _side(reply: Reply, checked: Checked) -> dict[str, Any]:
    fields = {"passed": checked.passed, "reasons": list(checked.reasons), "no_verdict": checked.no_verdict}
    return fields | {"answer": reply.text, "finished": reply.finished}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the shares, the comparison and the first rows that changed (of one model: that do not pass)."""
    sides = [side for side in ("base", "tuned") if side in found]
    result = []
    for side in sides:
        name = f"golden set  {side if len(sides) > 1 else ''}".rstrip()
        result.append(f"{name:<19}{share_text(found[side]['pass_rate'])}")
        result += [f"{'':<12}{visible(tag):<12}{share_text(one)}" for tag, one in found[side]["tags"].items()]
        if found[side]["no_verdict"]:
            asked = counted(found[side]["judged"], "row")
            lacking = f"{found[side]['no_verdict']} of {asked} that a judge was asked about have no verdict"
            result.append(f"{'':<12}{lacking} and are not passed")
    if "changes" not in found:
        failed = [one for one in found["answers"] if not one["tuned"]["passed"]]
        return [*result, *_first(failed, "do not pass", lambda one: _alone_lines(one))]
    result.append(f"{'':<12}" + ", ".join(f"{count} {name}" for name, count in found["changes"].items()))
    result.append(f"{'':<12}{comparison_text(found['comparison'])}")
    changed = [one for kind in CHANGES[:2] for one in found["answers"] if one["change"] == kind]
    return [*result, *_first(changed, "changed", lambda one: _beside_lines(one))]


def share_text(one: dict[str, Any]) -> str:
    """Return a share with its interval, in percent."""
    low, high = one["interval"]
    return f"{one['passed']} of {one['rows']} pass, {one['value']:.1%}  (95% interval {low:.1%} to {high:.1%})"


def comparison_text(compared: dict[str, Any] | None) -> str:
    """Say plainly who wins, by which test."""
    if compared is None:
        return "not compared: no row has a verdict of both models"
    words = {"wins": "the tuned model passes more rows", "loses": "the tuned model is WORSE than the base",
             "undecided": "the tuned model does not win: the rows show no difference"}  # fmt: skip
    low, high = compared["interval"]
    difference = f"{compared['difference']:+.1%} ({low:+.1%} to {high:+.1%})"
    return f"{words[compared['verdict']]}: {difference}  ({compared['test']}, p = {compared['p']:.2g})"


def _first(rows: list[dict], what: str, show: Any) -> list[str]:
    result = [line for one in rows[:SHOWN] for line in ("", *show(one))]
    more = len(rows) - SHOWN
    return [*result, "", f"({more} more rows {what}; --golden_page shows all)"] if more > 0 else result


def _alone_lines(one: dict[str, Any]) -> list[str]:
    shown = [f"{one['id']}: {one['prompt']}", f"answer: {_answer(one['tuned'])}", _why(one["tuned"])]
    return [part for text in shown for part in _wrapped(text, _width())]


def _beside_lines(one: dict[str, Any]) -> list[str]:
    """Return a row with both answers side by side."""
    width = (_width() - 3) // 2
    columns = [[name, *_wrapped(_answer(one[name]), width), *_wrapped(_why(one[name]), width)]
               for name in ("base", "tuned")]  # fmt: skip
    pairs = [f"{left:<{width}} | {right}".rstrip() for left, right in zip_longest(*columns, fillvalue="")]
    return [*_wrapped(f"{one['change'].upper()} {one['id']}: {one['prompt']}", _width()), *pairs]


def _answer(side: dict[str, Any]) -> str:
    return shown_answer(Reply(side["answer"], side["finished"]))


def _why(side: dict[str, Any]) -> str:
    return "pass" if side["passed"] else f"FAIL: {'; '.join(side['reasons'])}"


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 120))


def _wrapped(text: str, width: int) -> list[str]:
    """Return lines of a stranger's text for a terminal, at most six."""
    given = visible(text).replace("\t", " ").split("\n")
    found = [part for line in given for part in textwrap.wrap(line, width) or [""]]
    return found if len(found) <= 6 else [*found[:5], f"... {len(found) - 5} more lines"]


def page_of(found: dict[str, Any], names: dict[str, str]) -> str:
    """Return a self-contained page of a report: the models' `names` by side, the shares, then every row."""
    sides = [side for side in ("base", "tuned") if side in found]
    groups = [("all", [found[side]["pass_rate"] for side in sides])]
    groups += [(tag, [found[side]["tags"][tag] for side in sides]) for tag in found["tuned"]["tags"]]
    shares = [[name, *(cell for one in ones for cell in _cells(one))] for name, ones in groups]
    head = ["rows", *(cell for side in sides for cell in (f"{side}: pass", "of", "share", "95% interval"))]
    parts = [table(["model", "name"], [[side, names[side]] for side in sides]), table(head, shares)]
    if "changes" in found:
        parts += [prose(comparison_text(found["comparison"])), table(list(CHANGES), [list(found["changes"].values())])]
    for group in CHANGES if "changes" in found else ("FAIL", "pass"):
        rows = [one for one in found["answers"] if one.get("change", _why(one["tuned"])[:4]) == group]
        parts += [heading(f"{group}: {len(rows)}")] * bool(rows) + [_row(one, sides) for one in rows]
    return page("Golden set" + ": tuned against base" * (len(sides) > 1), parts, style=_STYLE)


def _cells(one: dict[str, Any]) -> list[Any]:
    low, high = one["interval"]
    return [one["passed"], one["rows"], f"{one['value']:.1%}", f"{low:.1%} to {high:.1%}"]


def _row(one: dict[str, Any], sides: Sequence[str]) -> str:
    columns = "".join(
        f"<div>{heading(side, 4)}{preformatted(_answer(one[side]))}{prose(_why(one[side]))}</div>" for side in sides
    )
    tags = f" ({', '.join(one['tags'])})" if one["tags"] else ""
    return (
        f'<section class="row">{heading(one["id"] + tags, 3)}{preformatted(one["prompt"])}'
        f'<div class="both">{columns}</div></section>'
    )
