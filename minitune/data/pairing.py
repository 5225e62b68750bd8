"""Preference records -> pairs and judged examples, as `examples` does for supervised training.

Each side is encoded with its prompt as an example of its own, and both must begin with the same prompt tokens.
Nothing is cut by default; "prompt" cuts the prompt of both sides alike, by what the longer side needs, and "drop"
leaves out a pair of which either side is too long. Cutting answers was rejected: the end-of-turn token would go.

What can teach nothing is left out and counted: sides whose tokens are equal, answers of equal score. Rows that
say the opposite of each other are refused, over all files: `contradictions`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minitune.data.examples import Survey, TrainOn, Truncate, encode_record, fitted, percentiles, survey_examples
from minitune.data.formats import Kind
from minitune.data.preference_formats import PreferenceRecord
from minitune.data.preferences import Item, Judged, Pair, answer_to, item_ids, with_mismatches
from minitune.data.reading import RowError, first_of
from minitune.errors import ConfigError, DataError

_REMEDY = {
    "error": "raise max_length, choose truncate (prompt or drop), or shorten them",
    "prompt": "their answers alone do not fit: raise max_length, remove them, or choose truncate drop",
    "drop": "no row is left: raise max_length",
}


@dataclass
class PreferenceSurvey(Survey):
    """What became of preference records; `lengths` are those of each row's longer side.

    `tied` counts answers of equal score and `equal` sides of equal tokens, both left out.
    """

    tied: int = 0
    equal: int = 0

    @property
    def remedy(self) -> str:
        """What to do about rows that are still over-long."""
        return _REMEDY[self.truncate]

    def problem(self) -> str | None:
        """Return why these records cannot be trained on, in one line, or None."""
        left_out = self.tied + self.equal
        if left_out and not (self.examples or self.errors or self.over_long):
            return f"no pair is left: {self.tied} have equal scores, {self.equal} equal sides; give other rows"
        return super().problem()


def survey_records(kind: Kind, records: Iterable[Any], tokenizer: Any, **options: Any) -> Survey:
    """Do the work of `survey_examples` or, for the other kinds of records, of `survey_preferences`."""
    return (survey_examples if kind == "examples" else survey_preferences)(records, tokenizer, **options)


def survey_preferences(
    records: Iterable[PreferenceRecord], tokenizer: Any, *, max_length: int, truncate: Truncate, train_on: TrainOn
) -> PreferenceSurvey:
    """Encode preference records and collect what is wrong; its `examples` are of class Pair or Judged."""
    if truncate == "split":
        raise ConfigError("truncate split is for texts; choose error, prompt or drop")
    survey = PreferenceSurvey(max_length, truncate)

    def encode(record: PreferenceRecord) -> list[Item]:
        if record.tied:
            survey.tied += 1
            return []
        sides = [encode_record(side, tokenizer, train_on) for side in record.sides]
        if len({side.prompt for side in sides}) > 1:
            problem = "the prompts of the two sides differ as tokens"
            raise RowError(record.origin, problem, "write one prompt, or use another chat template")
        if len({side.ids for side in sides}) < len(sides):
            survey.equal += 1
            return []
        longer = max(range(len(sides)), key=lambda i: len(sides[i].ids))
        survey.lengths.append(len(sides[longer].ids))
        for kept in fitted(record.sides[longer], sides[longer], tokenizer, survey, train_on):
            sides = [answer_to(kept.prompt, side) for side in sides]
            judged = record.desirable is not None
            return [Judged(sides[0], record.desirable) if judged else Pair(*sides, margin=record.margin)]
        return []

    survey.collect(records, encode)
    return survey


def contradictions(items: Iterable[Pair | Judged]) -> list[RowError]:
    """Return an error for each item that says the opposite of one before it, by their tokens."""
    seen: dict[Any, str] = {}
    errors = []
    for item in items:
        ids = item_ids(item)
        if isinstance(item, Pair):
            said, opposite = ids, ids[::-1]
            problem = "a pair that another row has the other way round"
        else:
            said, opposite = (ids, item.desirable), (ids, not item.desirable)
            problem = "an answer that another row judges the other way"
        if opposite in seen:
            errors.append(RowError(item.origin, problem, f"remove it or {seen[opposite]}"))
        seen.setdefault(said, item.origin)
    return errors


def missing_label(items: Sequence[Pair | Judged]) -> str | None:
    """Return what is wrong with judged answers that are all good or all bad, or None."""
    labels = {item.desirable for item in items if isinstance(item, Judged)}
    if len(labels) != 1:
        return None
    return f"no training row has the label {str(not labels.pop()).lower()}; kto learns from both, add some"


def checked_preferences(training: list[list[Item]], validation: list[Item]) -> tuple[list[list[Item]], list[Item]]:
    """Return the items of each source and of validation, judged ones with their mismatched answers.

    Raises DataError for rows that contradict each other, and for judged rows of one label only.
    """
    learned = [item for items in training for item in items]
    if errors := contradictions([*learned, *validation]):
        raise DataError(first_of(errors))
    if problem := missing_label(learned):
        raise DataError(problem)
    if not isinstance(learned[0], Judged):
        return training, validation
    mismatched = iter(with_mismatches(learned))
    return [[next(mismatched) for _ in items] for items in training], with_mismatches(validation)


def preference_counts(items: Sequence[Item]) -> dict[str, int]:
    """Return the target tokens of both sides and the pairs with a margin, or how many answers are desirable."""
    lengths = answer_lengths(items)
    if "desirable" in lengths:
        return {name: len(counts) for name, counts in lengths.items()}
    tokens = {f"{side}_tokens": sum(counts) for side, counts in lengths.items()}
    return tokens | {"margins": sum(pair.margin is not None for pair in items)}


def preference_summary(items: Sequence[Item]) -> dict[str, Any]:
    """Return the counts, the percentiles of the answers' tokens, and of pairs the share whose chosen one is longer."""
    lengths = answer_lengths(items)
    summary = preference_counts(items) | {"lengths": {name: percentiles(counts) for name, counts in lengths.items()}}
    if "chosen" in lengths:
        longer = sum(chosen > rejected for chosen, rejected in zip(*lengths.values(), strict=True))
        summary["chosen_longer"] = longer / len(items)
    return summary


def answer_lengths(items: Sequence[Item]) -> dict[str, list[int]]:
    """Return the target tokens of each chosen and each rejected answer, or of each desirable and undesirable one."""
    if isinstance(items[0], Pair):
        return {side: [sum(getattr(pair, side).targets) for pair in items] for side in ("chosen", "rejected")}
    names = {"desirable": True, "undesirable": False}
    return {name: [sum(i.example.targets) for i in items if i.desirable == good] for name, good in names.items()}
