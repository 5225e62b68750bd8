"""People's scores of answers, to hold a judge's against: rows of a file, agreement criterion by criterion.

    {"row": 3, "side": "base", "scores": {"clarity": 7, "correctness": 9}}

`row` counts prompts from 1, `side` is "tuned" (the default) or "base". Scores have an order and a near miss is no full
one, so agreement is kappa with quadratic weights (`agreement`). A correlation was rejected: a judge who always gives
two points more than people correlates fully.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitune.data.reading import RowError, first_of, read_rows
from minitune.errors import DataError, nearest, type_name
from minitune.evaluation.agreement import agreement
from minitune.evaluation.rubric import Rubric
from minitune.evaluation.verdicts import Missing, criteria

Scores = dict[tuple[str, int], dict[str, int]]
"""(side, place) -> score by criterion."""


def read_people(path: str | Path, rows: int, sides: Sequence[str], rubric: Rubric) -> Scores:
    """Return people's scores of the answers to `rows` prompts by the models of `sides`.

    Raises DataError with file:line for a row that is malformed, for an answer that is not there, with a criterion or
    score that is not the rubric's, or the second for an answer; and where there is none.
    """
    found: Scores = {}
    errors = []
    for origin, fields in read_rows(path):
        try:
            if isinstance(fields, RowError):
                raise fields
            key, scores = _row(fields, origin, rows, sides, rubric)
            if key in found:
                raise RowError(origin, f"row {key[1] + 1} of the {key[0]} model has scores already", "keep one of them")
            found[key] = scores
        except RowError as error:
            errors.append(error)
    if errors:
        raise DataError(first_of(errors))
    if not found:
        raise DataError(f"{path}: no rows; give a file with at least one row")
    return found


def _row(
    fields: dict[str, Any], origin: str, rows: int, sides: Sequence[str], rubric: Rubric
) -> tuple[tuple[str, int], dict[str, int]]:
    known = ("row", "side", "scores")
    for name in fields:
        if name not in known:
            raise RowError(origin, f"unknown key '{name}'{nearest(name, known)}", f"a row has {', '.join(known)}")
    row, side, scores = fields.get("row"), fields.get("side", "tuned"), fields.get("scores")
    if type(row) is not int or not 1 <= row <= rows:
        raise RowError(origin, f"the row is {row!r}", f"count the prompts, 1 to {rows}")
    if side not in sides:
        raise RowError(origin, f"the side is {side!r}", f"write {' or '.join(sides)}")
    if not isinstance(scores, dict) or not scores:
        raise RowError(origin, f"'scores' is {type_name(scores)}", 'write {"criterion": number}')
    (low, high), names = rubric.scale, criteria(rubric)
    for name, score in scores.items():
        if name not in names:
            raise RowError(origin, f"unknown criterion '{name}'{nearest(name, names)}", f"known: {', '.join(names)}")
        if type(score) is not int or not low <= score <= high:
            raise RowError(origin, f"the score of '{name}' is {score!r}", f"write a whole number, {low} to {high}")
    return (side, row - 1), scores


def score_agreement(judged: dict[str, Sequence[dict[str, int] | Missing]], people: Scores, rubric: Rubric) -> dict:
    """Return the agreement of a judge's scores (by side) with people's, by criterion; None where no answer has both."""
    low, high = rubric.scale
    found: dict[str, Any] = {}
    for name in criteria(rubric):
        both = [
            (judged[side][place][name], scores[name])
            for (side, place), scores in people.items()
            if name in scores and not isinstance(judged[side][place], Missing)
        ]
        columns = list(zip(*both, strict=True))
        found[name] = asdict(agreement(*columns, range(low, high + 1), "quadratic")) if columns else None
    return found


def agreement_lines(found: dict[str, Any]) -> list[str]:
    """Return the agreement by criterion for a reader."""
    lines = []
    for name, one in found.items():
        if one is None:
            text = "not known: no answer has both people's and the judge's score"
        elif one["kappa_interval"] is None:
            text = f"{one['rows']} answers, no kappa: one side always gives the same score"
        else:
            low, high = one["kappa_interval"]
            text = f"weighted kappa {one['kappa']:.2f} (95% interval {low:.2f} to {high:.2f}), {one['rows']} answers"
        lines.append(f"agreement   {name}: {text}")
    return lines
