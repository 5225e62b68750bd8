"""A language model as judge: which of two answers does it hold for the better, asked in both orders.

    d(x, y) = log p("A" | rubric, prompt, x as answer A, y as answer B) - log p("B" | the same)
    x wins over y   if d(x, y) > 0 and d(y, x) < 0;   y wins the other way round;   else a tie
    score(x) = (wins + ties / 2) / (number of other answers)                (Copeland's score, 0 to 1)

Judges favour a place (Zheng et al. 2023, section 3.3), so a verdict that turns with the order is a tie. The verdict is
read from the probabilities of the two letters, as what the model would write need not be a verdict at all. All N
answers to a prompt meet in a round robin, N (N - 1) passes: verdicts need not be transitive, and a knock-out, N - 1
meetings for the best one, would let their order decide. N is small, as answers cost more than verdicts.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F

from minitune.data.examples import Example
from minitune.errors import CheckpointError, ConfigError
from minitune.evaluation.answers import shown_messages
from minitune.evaluation.reward import last_hidden
from minitune.evaluation.verdicts import marked
from minitune.model.transformer import Transformer
from minitune.text.chat import render_chat
from minitune.text.tokenizer import Tokenizer

RUBRIC = (
    "Compare two answers to the same request. The better answer is the one that is more correct, follows the request "
    "more closely, and is clearer. Length alone is no merit, nor is the order in which the answers are shown."
)


def rank(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[dict[str, Any]]],
    answers: Sequence[Sequence[str]],
    *,
    rubric: str = RUBRIC,
    batch_size: int = 16,
) -> list[list[float]]:
    """Return the score of each answer among those to its prompt, 0 (lost to all) to 1 (won over all).

    Args:
        model: the judge.
        tokenizer: its tokenizer, with a chat template.
        prompts: texts or lists of messages.
        answers: of each prompt; a single one scores 0.5.
        rubric: what makes an answer better, as text before the prompt.
        batch_size: comparisons read at once.

    Raises:
        ConfigError: the judge has no chat template, is a reward model, or writes both letters alike.
        DataError: a comparison is too long for the judge. CheckpointError: a score is not finite.
    """
    found = differences(model, tokenizer, prompts, answers, rubric, batch_size)
    return [standings(len(texts), one) for texts, one in zip(answers, found, strict=True)]


@torch.inference_mode()
def differences(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[dict[str, Any]]],
    answers: Sequence[Sequence[str]],
    rubric: str = RUBRIC,
    batch_size: int = 16,
) -> list[dict[tuple[int, int], float]]:
    """Return d for every two answers to each prompt, {(i, j): answer i in the first place, j in the second}.

    Arguments and errors as in `rank`.
    """
    letters = letter_ids(tokenizer)
    asked = [
        (row, first, second)
        for row, texts in enumerate(answers)
        for first, second in permutations(range(len(texts)), 2)
    ]
    comparisons = []
    for row, first, second in asked:
        text = question(prompts[row], answers[row][first], answers[row][second], rubric)
        ids = render_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True).ids
        comparisons.append(Example(tuple(ids), (), f"prompt {row + 1}, answers {first + 1} and {second + 1}"))
    head = model.head_weight[list(letters)]  # (2, D): all but these two logits cancel in d
    hidden = last_hidden(model, comparisons, batch_size, "judge")
    logits = model.capped(F.linear(hidden.float(), head.float()))
    if not bool(logits.isfinite().all()):
        raise CheckpointError("the judge gives a letter no finite score; use dtype float32, or check the weights")
    found: list[dict] = [{} for _ in answers]
    for (row, first, second), difference in zip(asked, (logits[:, 0] - logits[:, 1]).tolist(), strict=True):
        found[row][first, second] = difference
    return found


def standings(count: int, differences: dict[tuple[int, int], float]) -> list[float]:
    """Return each answer's share of points, (wins + ties / 2) / (count - 1); 0.5 for one alone.

    `differences[i, j]` is d of answer i in the first place against j in the second, for all i and j apart.
    """
    points = [0.0] * count
    for i, j in differences:
        first, second = differences[i, j], differences[j, i]
        points[i] += 1.0 if first > 0 > second else 0.0 if first < 0 < second else 0.5
    return [point / (count - 1) if count > 1 else 0.5 for point in points]


def question(prompt: str | Sequence[dict[str, Any]], first: str, second: str, rubric: str) -> str:
    """Return what the judge is asked, with `first` as answer A and `second` as answer B."""
    request = prompt if isinstance(prompt, str) else shown_messages(prompt)
    shown = marked([("Request", request), ("Answer A", first), ("Answer B", second)])
    return f"{rubric.strip()}\n\n{shown}\n\nWhich answer is better? Reply with one letter, A or B."


def letter_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids with which the answers "A" and "B" begin where the model has to write.

    Raises ConfigError where there is no chat template, or where both begin with the same token.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(f"{tokenizer.origin} has no chat template, which a judge needs; use an instruct model")
    ids = []
    for letter in ("A", "B"):
        asked, answer = {"role": "user", "content": "A or B?"}, {"role": "assistant", "content": letter}
        rendered = render_chat(tokenizer, [asked, answer])
        ids.append(rendered.ids[rendered.targets.index(True)])
    if ids[0] == ids[1]:
        raise ConfigError(f"{tokenizer.chat_template.name} begins every answer alike; use another judge")
    return ids[0], ids[1]
