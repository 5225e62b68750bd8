"""The report of `prepare` as one self-contained page, made of what report.json holds and of nothing else."""

from collections.abc import Mapping
from typing import Any

from minitune.errors import counted
from minitune.reporting.data_lines import GOLDEN_TEXTS, option_of
from minitune.reporting.page import folded, heading, histogram, page, preformatted, prose, table

LABELS = 20
_STYLE = "td { overflow-wrap: break-word; }"


def data_page(content: Mapping[str, Any]) -> str:
    """Return the page; `content` is what report.json holds."""
    facts = content["prepared"]
    parts = [prose(facts["verdict"]), *_problems(content)]
    parts += [prose("Go on with:"), preformatted(facts["next"])] if facts["next"] else []
    parts += [heading("What was read"), table(("file", "used for", "rows", "malformed", "sha256"), (
        (s["path"], s["role"], s["rows"], s["malformed"], s["sha256"][:12]) for s in facts["sources"]))]  # fmt: skip
    parts += _splits(facts) + _lengths(content) + _findings(content["findings"]) + _left_out(facts) + _leaks(facts)
    if len(facts["mixture"]) > 1:
        parts += [heading("Mixture of the training rows"), prose(f"Shares are of {facts['share_of']}.")]
        head = ("file", "used for", "rows drawn", "of", "share")
        rows = ((p["path"], p["role"], p["rows"], p["of"], f"{p['share']:.1%}") for p in facts["mixture"])
        parts.append(table(head, rows))
    options = ((name, "" if value is None else str(value)) for name, value in facts["options"].items())
    parts += [heading("Options"), folded("all options of this run", table(("option", "value"), options))]
    return page(f"Prepared data: {facts['output']}", parts, style=_STYLE)


def _problems(content: Mapping[str, Any]) -> list[str]:
    rows = [(p["count"], p["kind"], p["remedy"], ", ".join(p["origins"])) for p in content["problems"]]
    return [table(("rows", "training would refuse", "what to do", "first"), rows)] if rows else []


def _splits(facts: Mapping[str, Any]) -> list[str]:
    """Return the sizes, and each label's rows by split."""
    total = sum(facts["splits"].values())
    bars = [(name, name, rows) for name, rows in facts["splits"].items()]
    rows = (
        (name, count, f"{count / total:.1%}", f"{name}.jsonl", facts["lines"][name])
        for name, count in facts["splits"].items()
    )
    parts = [
        heading("Splits"),
        table(("split", "rows", "share", "file", "lines written"), rows),
        histogram("Rows by split", bars),
    ]
    if facts["golden_texts"]:
        parts.append(prose(f"Of the golden set: {GOLDEN_TEXTS}."))
    labels = facts.get("labels", [])
    if labels:
        names = list(labels[0])
        shown = [list(label.values()) for label in labels[:LABELS]]
        parts += [heading("Labels", 3), table(names, shown)]
        sums = [(str(row[0]), str(row[0]), sum(row[1:])) for row in shown]
        parts.append(histogram("Rows by label", sums))
        if labels[LABELS:]:
            parts.append(prose(f"and {counted(len(labels) - LABELS, 'label')} more, in report.json"))
    return parts


def _lengths(content: Mapping[str, Any]) -> list[str]:
    """Return the histogram of lengths and an epoch's size, of the training file as it was written."""
    shares = ", ".join(
        f"{share}% of rows have at most {length:,} tokens" for share, length in content["percentiles"].items()
    )
    numbers = {
        "examples": content["examples"], "tokens": content["tokens"], "target tokens": content["target_tokens"],
        "batches": content["batches"], "over max_length": content["over_long"],
        "exact duplicates": content["duplicates"].get("exact"),
        "the same question, another answer": content["duplicates"].get("other_answer"),
    }  # fmt: skip
    return [
        heading("train.jsonl as the model sees it"),
        histogram("Rows by length in tokens", content["histogram"], "tokens"),
        prose(f"{shares}."),
        table(("of one epoch", ""), numbers.items()),
    ]


def _findings(findings: list[dict[str, Any]]) -> list[str]:
    if not findings:
        return [heading("What was found"), prose("No check found anything in these rows.")]
    rows = ((one["level"], one["kind"].replace("_", " "), one["count"]) for one in findings)
    parts = [heading("What was found"), table(("level", "finding", "rows"), rows)]
    for one in findings:
        parts += [
            heading(f"{one['level']}: {one['kind'].replace('_', ' ')}, {counted(one['count'], 'row')}", 3),
            prose(f"Found: {one['message']}.\n\nTo do: {one['remedy']}{option_of(one)}."),
            folded("first rows", prose(", ".join(one["rows"]))),
        ]
    return parts


def _left_out(facts: Mapping[str, Any]) -> list[str]:
    if not facts["removed"] and not facts["changed"]:
        return []
    rows = [("left out", why, count) for why, count in facts["removed"].items()]
    rows += [("changed", what, count) for what, count in facts["changed"].items()]
    return [
        heading("Rows left out and changed"),
        table(("", "why", "rows"), rows),
        prose("removed.jsonl has every row that was left out, with its reason."),
    ]


def _leaks(facts: Mapping[str, Any]) -> list[str]:
    """Return the leaks by kind and splits, and the first of them."""
    unread = facts["evaluation_rows_unread"]
    against = [
        f"{name} ({counted(rows, 'row')}" + (f", {unread[name]:,} more cannot be read)" if name in unread else ")")
        for name, rows in facts["evaluation_sets"].items()
    ]
    parts = [
        heading("Leaks"),
        prose(f"Looked for between the splits; evaluation sets looked at: {', '.join(against) or 'none'}."),
    ]
    if not facts["leaks"]:
        return [*parts, prose("None was found.")]
    done = {
        "list": "They are still there, but for what is nearly a golden row; --leaks remove takes them out of the split "
        "nearer to training.",
        "remove": "They were taken out of the split nearer to training.",
    }[facts["options"]["leaks"]]
    rows = ((leak["kind"], leak["split"], leak["held_split"], leak["rows"]) for leak in facts["leaks"])
    parts += [table(("kind", "rows of", "stand in", "rows"), rows), prose(done)]
    first = ((k["kind"], k["row"], k["held_row"], k["share"], k["passage"]) for k in facts["first_leaks"])
    listed = table(("kind", "row", "held-out row", "share", "passage"), first)
    return [*parts, folded(f"the first {len(facts['first_leaks'])}; leaks.jsonl has all", listed)]
