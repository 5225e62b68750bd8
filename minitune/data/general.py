"""General text, from which what a model knows already is read: windows in a drawn order that is always the same."""

from typing import Any

from minitune.data.batching import shuffled
from minitune.data.examples import Example, survey_examples
from minitune.data.formats import read_records
from minitune.errors import DataError, counted

WINDOW = 256  # tokens


def general_examples(path: str, tokenizer: Any, tokens: int, longest: int = WINDOW) -> list[Example]:
    """Return windows of a file with `tokens` targets in all, or a part of a window more.

    Texts are cut; of rows of another kind, those with more than a window's tokens are left out.

    Args:
        path: in any format of training data, or a fetched set's name.
        tokenizer: the model's.
        tokens: targets wanted.
        longest: tokens that the model reads.

    Raises:
        DataError: a row cannot be used, or the file has fewer targets.
    """
    records, found, targets = read_records(path), [], 0
    for place in shuffled(len(records), "general text"):
        if targets >= tokens:
            break
        survey = survey_examples(
            [records[place]], tokenizer, max_length=min(WINDOW, longest), truncate="split", train_on="all"
        )
        survey.over_long.clear()
        if survey.errors:
            raise DataError(str(survey.problem()))
        found += survey.examples
        targets += sum(sum(example.targets) for example in survey.examples)
    if targets < tokens:
        found = counted(targets, "token")
        raise DataError(f"{path} has {found} of general text, not the {tokens:,} of penalty.tokens; lower that")
    chosen, targets = [], 0
    for place in shuffled(len(found), "windows"):
        if targets < tokens:
            chosen.append(found[place])
            targets += sum(found[place].targets)
    return chosen
