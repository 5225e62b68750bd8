"""Command: make more rows like some seeds with a teacher, filter them, and have a sample of them judged by people.

    python -m minitune.synthesize --config synthesis --seeds seeds.jsonl --output synthetic --teacher.model BIG
    python -m minitune.synthesize ... --teacher.endpoint http://localhost:8000/v1 --teacher.key_variable MY_KEY
    python -m minitune.synthesize --output synthetic --review votes.json

The folder gets rows.jsonl (to train on), rejected.jsonl (everything else, with its reason), counts.json and
review.html, a page with a tenth of the rows to accept or reject. Its votes, given back with --review, make
reviewed.jsonl and say what they mean for the rows that nobody read. Every reply is kept in replies.jsonl as it comes
in, those of a judge in judgements.jsonl: the same command again asks only for what is missing, and with --overwrite
writes the rest anew.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, DataError, EndpointError, check_counts, check_seed, counted, run_command
from minitune.responder import ResponderOptions
from minitune.strict_json import loads

if TYPE_CHECKING:
    from minitune.curation.synthesis import Recipe, Rejected, Row
    from minitune.endpoint import Conversation, Reply

MADE = ("rows.jsonl", "rejected.jsonl", "counts.json", "review.html")
REVIEWED = ("reviewed.jsonl", "reviewed.json")
CHOICES = {"accept": "Accept", "reject": "Reject"}
DEFAULT_SCORE = 6.0  # of 10, with a judge and no min_score
ENOUGH = 0.1  # bad rows that are worth a word of advice

Step = Callable[["list[Row]"], "tuple[list[Row], list[Rejected]]"]


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """The seeds, the teacher, what it is asked, which rows are kept."""

    output: str
    """The folder for the rows and all that belongs to them."""
    seeds: str | None = None
    """Questions with their answers, in any format that trains: .jsonl, .json or .csv."""
    max_seeds: int | None = None
    """Use only the first seeds (default: all)."""
    instruction: str | None = None
    """What rows the teacher is to write; a recipe has it."""
    reply: Literal["json_lines", "numbered_list"] = "json_lines"
    """Ask for whole rows as JSON, or for a list of questions that the teacher then answers one by one."""
    per_seed: int = 3
    """Rows that one request asks for."""
    examples: int = 3
    """Seeds that a request shows: its own and others, drawn anew for each."""
    rounds: int = 1
    """Requests for each seed."""
    seed: int = 0
    """Fixes which seeds are shown together, and the sample for review."""
    teacher: ResponderOptions = ResponderOptions()
    """Who writes the rows."""
    near_duplicates: float | None = 0.8
    """Drop a row whose question is this like that of a seed or an earlier row: shared runs of words, 0 to 1; null drops
    equal ones alone."""
    refusals: Literal["drop", "keep"] = "drop"
    """What becomes of answers that refuse."""
    answer_form: str | None = None
    """Drop rows whose answers are not of this form: regex:PATTERN, choices:a,b, json or json:SCHEMA.json."""
    judge: ResponderOptions = ResponderOptions()
    """Who scores the rows (default: nobody)."""
    rubric: str | None = None
    """With judge: what it goes by, a .yaml or .md file (default: correct, relevant, clear)."""
    min_score: float | None = None
    """With judge: drop rows whose mean score over the rubric's criteria is below this (default 6); rows without a
    readable score are dropped too."""
    review_share: float = 0.1
    """The share of the rows that is drawn for people to judge."""
    review: str | None = None
    """The votes that review.html saved: apply them to the rows of `output`."""
    overwrite: bool = False
    """Replace what an earlier run wrote, but for the replies it paid for."""

    def __post_init__(self):
        """Refuse missing and ignored options, numbers without meaning, and files that would be lost."""
        if self.review is not None:
            for field in fields(self):
                if field.name not in ("output", "review", "overwrite") and getattr(self, field.name) != field.default:
                    raise ConfigError(f"{field.name} has no effect on the votes of a review; leave it out")
        else:
            for name, value in (("seeds", self.seeds), ("instruction", self.instruction),
                                ("teacher.model", self.teacher.model)):  # fmt: skip
                if value is None:
                    raise ConfigError(
                        f"{name} is missing; see --help (a recipe has an instruction: --config synthesis)"
                    )
            for name in ("rubric", "min_score"):
                if getattr(self, name) is not None and self.judge.model is None:
                    raise ConfigError(f"{name} is set without judge.model, to which it belongs; leave it out")
        check_counts(max_seeds=self.max_seeds)
        check_seed(self.seed)
        if not 0 < self.review_share <= 1:
            raise ConfigError(f"review_share is {self.review_share}; it must be above 0 and at most 1")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ConfigError(f"near_duplicates is {self.near_duplicates}; it must be above 0 and at most 1, or null")
        for name in (*MADE, *REVIEWED) if self.review is None else REVIEWED:
            if Path(self.output, name).exists() and not self.overwrite:
                raise ConfigError(f"{self.output}/{name} is there already; name another folder, or give --overwrite")

    def recipe(self) -> "Recipe":
        """Return what the teacher is asked."""
        from minitune.curation.synthesis import Recipe

        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})

    def identity(self) -> dict[str, Any]:
        """Return all that decides which rows come out of given seeds, but for the form's and the rubric's files."""
        asked = {name: getattr(self, name) for name in ("near_duplicates", "refusals", "answer_form", "rubric")}
        judge = {"judge": loads(self.judge.identity), "min_score": self.min_score} if self.judge.model else {}
        return asdict(self.recipe()) | asked | {"teacher": loads(self.teacher.identity)} | judge


def main(argv: list[str] | None = None) -> int:
    """Parse the options; make rows, or apply the votes on them. Returns 1 where requests had no answer."""
    config = parse(SynthesizeConfig, argv, prog="python -m minitune.synthesize", description=__doc__.split("\n")[0])
    if config.review is not None:
        print(apply_review(config))
        return 0
    return synthesize(config)


def synthesize(config: SynthesizeConfig) -> int:
    """Ask, read, filter, write; errors as the readers, the teacher and the filters raise them."""
    from minitune.curation import synthesis
    from minitune.files import file_sha256, sole_writer
    from minitune.sources import resolve

    path = resolve(config.seeds)
    seeds = synthesis.read_seeds(path)[: config.max_seeds]
    recipe = config.recipe()
    asked = synthesis.requests(seeds, recipe)
    teacher = _Asker(config.teacher, Path(config.output, "replies.jsonl"), "ask")
    steps, asking = _steps(config, seeds, teacher)  # before the work, not after: a form or a rubric may be broken
    with sole_writer(Path(config.output)):
        rows, rejected = _read(asked, teacher, recipe)
        counts: dict[str, Any] = {"seeds": len(seeds), "requests": len(asked), "rows_read": len(rows)}
        for step in steps:
            rows, dropped = step(rows)
            rejected += dropped
        counts |= {"rows_kept": len(rows), "rejected": synthesis.counts_of(rejected)}
        facts = {"seeds": str(path), "seeds_sha256": file_sha256(path), "recipe": config.identity()}
        write(config, rows, rejected, facts, counts)
    print(table(config, counts))
    unanswered = sum(one.unanswered for one in asking)
    if unanswered:
        print(f"{counted(unanswered, 'request')} had no answer; the same command with --overwrite asks for the rest",
              file=sys.stderr)  # fmt: skip
    if not rows:
        raise DataError(f"no row is left; {config.output}/rejected.jsonl says why")
    return int(unanswered > 0)


def _read(
    asked: "list[tuple[Row, Conversation]]", teacher: "_Asker", recipe: "Recipe"
) -> "tuple[list[Row], list[Rejected]]":
    """Ask the teacher and read its replies."""
    from minitune.curation.synthesis import Rejected, read_rows_of

    rows, rejected = [], []
    for (seed, _), reply in zip(asked, teacher([conversation for _, conversation in asked]), strict=True):
        missing = isinstance(reply, Rejected)
        read, dropped = ([], [replace(reply, origin=seed.origin)]) if missing else read_rows_of(reply, seed, recipe)
        rows += read
        rejected += dropped
    return rows, rejected


def _steps(config: SynthesizeConfig, seeds: "Sequence[Row]", teacher: "_Asker") -> tuple[list[Step], "list[_Asker]"]:
    """Return what rows go through, each step rows -> (rows, rejected), and all who are asked in it."""
    from minitune.curation import synthesis
    from minitune.evaluation.compliance import answer_form
    from minitune.evaluation.refusal import is_refusal

    steps: list[Step] = [partial(synthesis.without_duplicates, seeds=seeds, threshold=config.near_duplicates)]
    asking = [teacher]
    if config.reply == "numbered_list":
        steps.append(partial(_answered, teacher=teacher))
    if config.refusals == "drop":
        steps.append(partial(synthesis.filtered, reason="a refusal", bad=is_refusal, details=""))
    if config.answer_form is not None:
        complies = answer_form(config.answer_form)
        details = {"reason": "not of the form", "details": config.answer_form}
        steps.append(partial(synthesis.filtered, bad=lambda answer: not complies(answer), **details))
    if config.judge.model is not None:
        from minitune.evaluation.rubric import read_rubric

        rubric = read_rubric(config.rubric)
        least = DEFAULT_SCORE if config.min_score is None else config.min_score
        if not rubric.scale[0] <= least <= rubric.scale[1]:
            raise ConfigError(f"min_score is {least:g}; the rubric's scale is {rubric.scale[0]} to {rubric.scale[1]}")
        asking.append(_Asker(config.judge, Path(config.output, "judgements.jsonl"), "judge"))
        steps.append(partial(_judged, judge=asking[-1], rubric=rubric, least=least))
    return steps, asking


class _Asker:
    """A teacher or judge with the journal of its replies, loaded when it is first asked something new."""

    def __init__(self, options: ResponderOptions, journal: Path, doing: str):
        from minitune.sources import resolve

        if options.endpoint is None:
            resolve(options.model)  # refuses a name that is none, before the work
        self.options, self.journal, self.doing = options, journal, doing
        self.responder: Any = None
        self.unanswered = 0

    def __call__(self, conversations: "Sequence[Conversation]") -> "list[Reply | Rejected]":
        """Return the reply to each, or the rejection, without origin, of what had none."""
        from tqdm import tqdm

        from minitune.curation.synthesis import Rejected
        from minitune.evaluation.verdicts import Missing, ask_all

        with tqdm(total=len(conversations), desc=self.doing, unit=" requests") as bar:
            replies = ask_all(
                self._respond, conversations, judge=self.options.identity, journal=self.journal,
                at_once=self.options.at_once, on_batch=bar.update,
            )  # fmt: skip
        missing = [reply for reply in replies if isinstance(reply, Missing)]
        if missing and len(missing) == len(replies):
            raise EndpointError(f"none of {counted(len(missing), 'request')} had an answer: {missing[0].details}")
        self.unanswered += len(missing)
        return [
            Rejected(reply.kind, reply.details, "", text="") if isinstance(reply, Missing) else reply
            for reply in replies
        ]

    def _respond(self, conversations: "Sequence[Conversation]") -> "list[Reply]":
        self.responder = self.responder or self.options.responder()
        return self.responder(conversations)


def _answered(rows: "list[Row]", teacher: _Asker) -> "tuple[list[Row], list[Rejected]]":
    """Have the teacher answer its own questions."""
    from minitune.curation import synthesis

    replies = teacher([synthesis.answer_request(row) for row in rows])
    found = [
        replace(reply, origin=row.origin, row=row) if isinstance(reply, synthesis.Rejected)
        else synthesis.with_answer(row, reply)
        for row, reply in zip(rows, replies, strict=True)
    ]  # fmt: skip
    return synthesis.apart(found)


def _judged(rows: "list[Row]", judge: _Asker, rubric: Any, least: float) -> "tuple[list[Row], list[Rejected]]":
    """Have a judge score the rows, by the mean over the rubric's criteria."""
    from minitune.curation.synthesis import Rejected, apart
    from minitune.evaluation.verdicts import Missing, read_scores, score_question

    replies = judge([score_question(row.question, row.answer, rubric) for row in rows])
    found: list[Row | Rejected] = []
    for row, reply in zip(rows, replies, strict=True):
        scores = reply if isinstance(reply, Rejected) else read_scores(reply, rubric)
        if isinstance(scores, Rejected):
            found.append(replace(scores, origin=row.origin, row=row))
        elif isinstance(scores, Missing):
            found.append(Rejected(f"not judged: {scores.kind}", scores.details, row.origin, row))
        else:
            row = replace(row, score=mean(scores.values()))
            shown = ", ".join(f"{name} {score}" for name, score in scores.items())
            found.append(row if row.score >= least else Rejected("judged below min_score", shown, row.origin, row))
    return apart(found)


def write(config: SynthesizeConfig, rows: "list[Row]", rejected: "list[Rejected]", facts: dict, counts: dict) -> None:
    """Write the rows with where they came from, what was rejected, the counts, and the page for review."""
    from minitune.curation.synthesis import review_sample
    from minitune.files import atomic_file, write_json, write_rows

    folder = Path(config.output)
    decisive = {name: facts[name] for name in ("recipe", "seeds_sha256")}
    sha256 = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    lines = []
    for row in rows:
        made = {"seed": row.origin, "teacher": config.teacher.name, "recipe": sha256}
        lines.append(row.fields() | {"synthetic": made | ({} if row.score is None else {"score": row.score})})
    drawn = review_sample(len(rows), config.review_share, config.seed)
    for name in REVIEWED:  # of other rows
        (folder / name).unlink(missing_ok=True)
    write_rows(folder / "rows.jsonl", lines)
    write_rows(folder / "rejected.jsonl", [one.fields() for one in rejected])
    with atomic_file(folder / "review.html") as path:
        path.write_text(_review_page(lines, drawn), encoding="utf-8")
    with atomic_file(folder / "counts.json") as path:
        write_json(path, facts | {"recipe_sha256": sha256, "counts": counts, "review": [i + 1 for i in drawn]})


def table(config: SynthesizeConfig, counts: dict[str, Any]) -> str:
    """Return the counts as lines for a reader."""
    lines = [
        f"teacher   {config.teacher.name}",
        f"seeds     {counts['seeds']:,}, asked for {counts['requests']:,} times {config.per_seed} rows",
        f"read      {counted(counts['rows_read'], 'row')}",
        *(f"rejected  {count:,}  {reason}" for reason, count in counts["rejected"].items()),
        f"kept      {counted(counts['rows_kept'], 'row')} in {config.output}/rows.jsonl",
    ]
    if counts["rows_kept"]:
        lines.append(f"review    open {config.output}/review.html, judge, and give the votes back with --review")
    return "\n".join(lines)


def _review_items(lines: Sequence[dict[str, Any]], drawn: Sequence[int]) -> list[Any]:
    from minitune.reporting.ballot import Item

    def context(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        return tuple((name, str(row[name])) for name in ("system", "instruction") if name in row)

    return [Item(f"row-{i + 1}", context(lines[i]), (("output", str(lines[i].get("output"))),)) for i in drawn]


def _review_page(lines: Sequence[dict[str, Any]], drawn: Sequence[int]) -> str:
    from minitune.reporting.ballot import ballot_page

    task = (
        "These rows were drawn at random. Accept a row that you would want a model to learn: the question makes sense, "
        "and the answer is right and whole. Reject every other one. What you decide here says how good the rows are "
        "that nobody reads."
    )
    return ballot_page("Review of synthetic rows", task, _review_items(lines, drawn), CHOICES)


def apply_review(config: SynthesizeConfig) -> str:
    """Write the rows without the rejected ones; return what the votes say, of the unread rows too, as lines.

    Raises DataError where the votes are not on these rows, or there are none; CheckpointError where the rows are gone.
    """
    from minitune.data.reading import RowError, read_rows
    from minitune.evaluation.metrics import wilson_interval
    from minitune.files import atomic_file, read_json, write_json, write_rows
    from minitune.reporting.ballot import read_votes

    folder = Path(config.output)
    numbers = read_json(folder / "counts.json").get("review", ())
    lines = []
    for _, line in read_rows(folder / "rows.jsonl"):
        if isinstance(line, RowError):
            raise line
        lines.append(line)
    drawn = [number - 1 for number in numbers if type(number) is int and 0 < number <= len(lines)]
    if not drawn or len(drawn) < len(numbers):
        raise DataError(f"{folder}: counts.json names no rows of rows.jsonl for review; make both anew")
    votes = read_votes(config.review, _review_items(lines, drawn), CHOICES)
    if not votes:
        raise DataError(f"{config.review}: no votes in it; judge some rows, save them, and give that file")
    out = {int(vote.item.removeprefix("row-")) - 1 for vote in votes if vote.choice == "reject"}
    if len(out) == len(lines):
        raise DataError(f"{config.review} rejects every row, so none is left; change the recipe or the teacher")
    low, high = wilson_interval(len(out), len(votes))
    unread = len(lines) - len(votes)
    found = {
        "drawn": len(drawn), "judged": len(votes), "rejected": len(out), "rows_kept": len(lines) - len(out),
        "acceptance": 1 - len(out) / len(votes), "acceptance_interval": [1 - high, 1 - low], "unread": unread,
        "unread_to_reject": unread * len(out) / len(votes),
        "unread_to_reject_interval": [unread * low, unread * high], "votes": [asdict(vote) for vote in votes],
    }  # fmt: skip
    write_rows(folder / REVIEWED[0], [line for i, line in enumerate(lines) if i not in out])
    with atomic_file(folder / REVIEWED[1]) as path:
        write_json(path, found)
    return _review_lines(found, folder)


def _review_lines(found: dict[str, Any], folder: Path) -> str:
    low, high = found["acceptance_interval"]
    fewest, most = found["unread_to_reject_interval"]
    lines = [
        f"accepted  {found['acceptance']:.1%} of {counted(found['judged'], 'judged row')} "
        f"(95% interval {low:.1%} to {high:.1%}); {found['drawn'] - found['judged']} of those drawn have no vote",
        f"kept      {counted(found['rows_kept'], 'row')} in {folder / REVIEWED[0]}, {found['rejected']} rejected",
    ]
    if not found["unread"]:
        return "\n".join(lines)
    lines.append(
        f"unread    {counted(found['unread'], 'row')}, of which you would reject about "
        f"{found['unread_to_reject']:.0f} ({fewest:.0f} to {most:.0f})"
    )
    if 1 - high > ENOUGH:
        lines.append("advice    more than a tenth is bad: change recipe, filters or teacher, or read all rows")
    elif 1 - low > ENOUGH:
        lines.append("advice    more than a tenth may be bad: a larger review_share would tell")
    else:
        lines.append("advice    fewer than a tenth are bad, as sure as the interval is")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
