"""What `prepare` has to say in a terminal: what training will make of rows, what was done to them, what is wrong."""

from collections.abc import Mapping
from typing import Any

from minitune.data.formats import READERS
from minitune.data.lint import Report
from minitune.errors import counted

BAR = 40  # characters of the longest bar
GOLDEN_TEXTS = (
    "its prompts are texts: training continues them, but a model with a chat template is asked golden rows as a chat; "
    "write rows as instruction and output to have both alike"
)
NOUNS = {"examples": "example", "pairs": "pair", "judged": "judged answer"}


def report_lines(report: Report, max_length: int, batch_size: int, packing: bool) -> list[str]:
    """Return the report as lines for a reader."""
    lines = []
    for file in report.files:
        unread = ", ".join(f"{name} ({count})" for name, count in file["unread_fields"].items())
        note = f"; fields not read: {unread}" if unread else ""
        rows, examples = counted(file["rows"], "row"), counted(file["examples"], "example")
        lines.append(f"{file['path']}: {rows} ({file['format']}), {examples}{note}")
    if not report.rows:
        return lines
    shares = ", ".join(f"{share}% {length}" for share, length in report.percentiles.items())
    lines += ["", f"length in tokens ({shares})", *_bars(report), ""]
    double = report.duplicates
    first = f" (first: {'; '.join(double['first'])})" if double["first"] else ""
    mode = "packed" if packing else "padded"
    lines += [
        f"rows           {report.rows}",
        f"over-long      {report.over_long} (over {max_length}; "
        f"{report.shortened} shortened, {report.dropped} dropped)",
        f"empty          {report.empty}",
        f"duplicates     {double['exact']} exact, {double['normalised']} normalised{first}",
        *_answer_lines(report),
        f"an epoch       {counted(report.examples, NOUNS[report.kind])}, {counted(report.tokens, 'token')}, "
        f"{report.target_tokens:,} of them targets, {counted(report.batches, 'batch')} of {batch_size} ({mode})",
        f"efficiency     {report.efficiency['packed']:.1%} packed, {report.efficiency['padded']:.1%} padded",
    ]
    return lines


def _answer_lines(report: Report) -> list[str]:
    """Return what is to be said of the answers, of pairs or judged ones with the lengths of both kinds."""
    if report.kind == "examples":
        again = counted(report.duplicates["other_answer"], "question")
        return [f"contradictory  {again} asked before with another answer"]
    found = report.preferences
    lines = [f"left out       {report.tied} of equal score, {report.equal} of equal sides"]
    for name, lengths in found.get("lengths", {}).items():
        shares = ", ".join(f"{share}% {length}" for share, length in lengths.items())
        count = f"{found[name]}, " if name in found else ""
        lines.append(f"{name:14} {count}target tokens {shares or 'none'}")
    if "chosen_longer" in found:
        lines.append(f"chosen longer  in {found['chosen_longer']:.1%} of pairs; {found['margins']} with a margin")
    return lines


def problem_lines(report: Report) -> list[str]:
    """Return the verdict as lines, with its reasons."""
    if not report.problems:
        objective = "" if report.kind == "examples" else f" with --objective {READERS[report.kind][1]}"
        return ["", f"training would accept these files{objective}"]
    lines = ["", "training would refuse these files:"]
    for problem in report.problems:
        places = ", ".join(problem.origins) + (", ..." if problem.count > len(problem.origins) else "")
        lines.append(
            f"  {problem.count} x {problem.kind}" + (f"; {problem.remedy} ({places})" if problem.remedy else "")
        )
    return lines


def _bars(report: Report) -> list[str]:
    """Return the histogram of lengths as text."""
    most = max((count for _, _, count in report.histogram), default=0)
    rows = [(f"{low}-{high}", count, "#" * -(-BAR * count // most)) for low, high, count in report.histogram]
    width = max((len(span) for span, _, _ in rows), default=0)
    return [f"  {span:>{width}} {bar} {count}" for span, count, bar in rows]


def finding_lines(findings: list[dict[str, Any]]) -> list[str]:
    """Return what is likely to be a fault as lines: level, kind and count, then message, remedy and first rows."""
    lines = []
    for one in findings:
        rows = ", ".join(one["rows"][:3]) + (", ..." if one["count"] > 3 else "")
        lines.append(f"{one['level']:8}{one['kind']} ({counted(one['count'], 'row')}): {one['message']}")
        lines.append(f"{'':8}{one['remedy']}{option_of(one)} ({rows})")
    return ["", "what was found", *lines] if lines else []


def option_of(one: Mapping[str, Any]) -> str:
    """Return the option of `prepare` that does something about a finding, after a semicolon; "" where there is none."""
    return f"; {one['option']}" if one.get("option") else ""


def prepared_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return what was done to the rows and where they are, as lines."""
    lines = []
    for source in facts["sources"]:
        broken = f", {source['malformed']} malformed left out" if source["malformed"] else ""
        lines.append(f"{source['path']}: {counted(source['rows'], 'row')} of {source['role']}{broken}")
    lines += [f"changed        {counted(count, 'row')} by {what}" for what, count in facts["changed"].items()]
    lines += [f"left out       {counted(count, 'row')}: {why}" for why, count in facts["removed"].items()]
    for name, rows in facts["evaluation_sets"].items():
        unread = facts["evaluation_rows_unread"].get(name, 0)
        note = f", {unread:,} more cannot be read" if unread else ""
        lines.append(f"looked at      {counted(rows, 'row')} of {name}{note}")
    lines += [
        f"leaks          {counted(leak['rows'], 'row')} of {leak['split']} in {leak['held_split']} ({leak['kind']})"
        for leak in facts["leaks"]
    ]
    if not facts["leaks"]:
        against = ["each other", *facts["evaluation_sets"]]
        lines.append(f"leaks          none between the splits and {', '.join(against)}")
    elif facts["options"]["leaks"] == "list":
        lines.append(f"{'':15}listed in leaks.jsonl; --leaks remove takes them out of the split nearer to training")
    if len(facts["mixture"]) > 1:
        lines += [
            f"mixture        {part['role']} {part['path']}: {part['rows']:,} of {counted(part['of'], 'row')}, "
            f"{part['share']:.1%} of the {facts['share_of']}"
            for part in facts["mixture"]
        ]
    total = sum(facts["splits"].values())
    if facts["golden_texts"]:
        lines.append(f"golden         {GOLDEN_TEXTS}")
    for name, rows in facts["splits"].items():
        written = facts["lines"][name]
        note = f", {counted(written, 'line')} of {name}.jsonl" if written != rows else ""
        lines.append(f"{name:15}{counted(rows, 'row')} ({rows / total:.1%}){note}")
    return lines
