"""Rows -> preference records: pairs of answers, scored answers and judged ones, with their one prompt.

| format | required         | optional                                 | becomes                                      |
|--------|------------------|------------------------------------------|----------------------------------------------|
| pairs  | chosen, rejected | a prompt, a margin or both scores        | a pair                                       |
| scored | completions      | prompt or instruction                    | the best and the worst of the list as a pair |
| judged | label            | a prompt and its answer, or a whole chat | an answer that is good (true) or bad (false) |

The prompt is one of these fields, and with it the answers are read as in supervised training:

- `prompt` as text, with answers that are texts: text after text, without a chat template.
- `prompt` (or `conversations`) as turns, with answers that are turns, one turn, or the text of one.
- `instruction` with `input` and `history` as Alpaca has them, and answers that are texts: a chat.
- none, with answers that are whole conversations: the prompt is the turns in which both begin (its tokens are
  compared after rendering). Texts of "\\n\\nHuman: ...\\n\\nAssistant: ..." are such conversations.

A margin is given, or the difference of two scores; answers of equal score are no pair and are left out, counted
as tied. The common prefix of characters was rejected: two answers that begin alike would lose words to the prompt.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from minitune.data.formats import (
    FORMATS,
    Format,
    Record,
    RowSource,
    check_chat,
    filled,
    parse_alpaca,
    read_turns,
    text_field,
)
from minitune.data.reading import RowError
from minitune.errors import nearest, type_name

Turns = list[dict[str, str]]
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_DIALOGUE = 'add the field prompt, or write "\\n\\nHuman: ...\\n\\nAssistant: ..."'


@dataclass(frozen=True)
class PreferenceRecord:
    """One row: the records of its answers (chosen and rejected, or one with `desirable`), alike in their prompts.

    `margin` says by how much the chosen answer is better, in the row's own scale; `tied` that it is not better.
    The others are as in `Record`.
    """

    origin: str
    sides: tuple[Record, ...]
    margin: float | None = None
    desirable: bool | None = None
    tied: bool = False
    format: str = ""
    document: bool = False
    unread: tuple[str, ...] = ()
    source: RowSource | None = None


def _parse_pair(fields: dict[str, Any], origin: str) -> PreferenceRecord:
    margin = _number(fields, "margin", origin)
    scores = [_number(fields, name, origin) for name in ("score_chosen", "score_rejected")]
    if scores != [None, None]:
        if None in scores:
            raise RowError(origin, "a score for one side only", "give score_chosen and score_rejected, or neither")
        if margin is not None:
            raise RowError(origin, "a margin beside scores", "keep one of them")
        margin = scores[0] - scores[1]
    if margin is not None and margin < 0:
        raise RowError(origin, "a chosen answer that is judged the worse", "swap the sides or correct the numbers")
    sides = _records(fields, origin, ("chosen", "rejected"))
    return PreferenceRecord(origin, sides, margin, tied=margin == 0 and scores[0] is not None)


def _parse_scored(fields: dict[str, Any], origin: str) -> PreferenceRecord:
    answers = _required(fields, "completions", origin)
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, dict) for answer in answers):
        remedy = 'write [{"response": ..., "score": ...}, ...]'
        raise RowError(origin, "the field 'completions' is not a list of two or more scored answers", remedy)
    scores = []
    for number, answer in enumerate(answers, 1):
        name = "overall_score" if "overall_score" in answer else "score"
        scores.append(_number(answer, name, f"{origin} (completion {number})"))
        if scores[-1] is None:
            raise RowError(origin, "a completion without a score", "add overall_score or score, or remove the row")
    best, worst = max(scores), min(scores)
    chosen, rejected = (text_field(answers[scores.index(score)], "response", origin) for score in (best, worst))
    sides = _records(fields | {"chosen": chosen, "rejected": rejected}, origin, ("chosen", "rejected"))
    return PreferenceRecord(origin, sides, best - worst, tied=best == worst)


def _parse_judged(fields: dict[str, Any], origin: str) -> PreferenceRecord:
    label = _required(fields, "label", origin)
    written = str(label).lower()
    if written not in ("true", "false"):  # a CSV file can only write the word
        problem = f"the field 'label' is {type_name(label)}, not true or false"
        raise RowError(origin, problem, "write true (desirable) or false")
    name = "output" if "instruction" in fields else "completion"
    chat = next((field for field in _CHATS if field in fields), None)
    if chat and not {"prompt", name} & set(fields):
        turns = read_turns(fields[chat], chat, origin)
        fields = fields | {chat: None, "prompt": turns[:-1] or None, name: turns[-1:]}
    return PreferenceRecord(origin, _records(fields, origin, (name,)), desirable=written == "true")


def _required(fields: dict[str, Any], name: str, origin: str) -> Any:
    if name not in fields:
        raise RowError(origin, f"the field '{name}' is missing{nearest(name, fields)}", "add it or remove the row")
    return fields[name]


def _number(fields: dict[str, Any], name: str, origin: str) -> float | None:
    """Return a finite number, which a CSV file writes as text, or None where there is none."""
    value = fields.get(name)
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(origin, f"the field '{name}' is not a finite number", "correct it or remove the row")
    return number


def _records(fields: dict[str, Any], origin: str, names: Sequence[str]) -> tuple[Record, ...]:
    """Return a record for each answer named, to the row's one prompt."""
    answers = {name: _required(fields, name, origin) for name in names}
    texts = all(isinstance(answer, str) for answer in answers.values())
    given = [name for name in ("prompt", "instruction", "conversations") if fields.get(name) is not None]
    if given[1:]:
        raise RowError(origin, f"more than one prompt ({', '.join(given)})", "keep one of the fields")
    if given == ["instruction"]:
        rows = [parse_alpaca(fields | {"output": _answer_text(fields, name, origin)}, origin) for name in names]
        return tuple(replace(row, context=len(row.messages) - 1) for row in rows)
    for name in ("input", "history"):
        if fields.get(name):
            raise RowError(origin, f"the field '{name}' without an instruction", "call the prompt instruction")
    system = text_field(fields, "system", origin, optional=True)
    prompt = fields[given[0]] if given else None
    if isinstance(prompt, str) and texts:
        if system:
            remedy = "call the prompt instruction, which makes it a chat, or write it as turns"
            raise RowError(origin, "a system field beside a prompt that is text", remedy)
        asked = filled(text_field({"prompt": prompt}, "prompt", origin), "a question", "prompt", origin)
        answered = [_answer_text(fields, name, origin) for name in names]
        return tuple(Record(origin, "", prompt=asked, completion=answer) for answer in answered)
    asked, turns = _conversation(prompt, answers, origin)
    if any(answer[0]["role"] != "assistant" for answer in turns):
        raise RowError(origin, "answers that begin with a question", "the sides must part at an assistant's turn")
    context = len(asked) + bool(system)
    chats = (check_chat(asked + answer, system, origin) for answer in turns)
    return tuple(Record(origin, "", messages=chat, context=context) for chat in chats)


def _answer_text(fields: dict[str, Any], name: str, origin: str) -> str:
    return filled(text_field(fields, name, origin), "an answer", name, origin)


def _conversation(prompt: Any, answers: dict[str, Any], origin: str) -> tuple[Turns, list[Turns]]:
    """Return the prompt's turns and those of each answer."""
    if isinstance(prompt, str | None) and len(answers) > 1:
        texts = all(isinstance(answer, str) for answer in answers.values())
        read = _dialogue if prompt is None and texts else _answer_turns
        turns = [read(answer, name, origin) for name, answer in answers.items()]
        if prompt is None or turns[0][0]["role"] != "assistant":
            asked, turns = _shared_turns(turns, origin)
            if prompt is not None and prompt.strip() not in [turn["content"].strip() for turn in asked]:
                raise RowError(origin, "a prompt that is not in the conversations", "leave out one of them")
            return asked, turns
    else:
        turns = [_answer_turns(answer, name, origin) for name, answer in answers.items()]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return read_turns(prompt, "prompt", origin), turns


def _answer_turns(answer: Any, name: str, origin: str) -> Turns:
    """Return the turns of an answer: a list of them, a single one, or its text."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    return read_turns([answer] if isinstance(answer, dict) else answer, name, origin)


def _dialogue(text: str, name: str, origin: str) -> Turns:
    """Return the turns of a text as Bai et al. 2022 wrote them (Anthropic's hh-rlhf)."""
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise RowError(origin, f"the field '{name}' is a text without a prompt", _DIALOGUE)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return read_turns([{"role": role.lower(), "content": said.strip()} for role, said in turns], name, origin)


def _shared_turns(sides: list[Turns], origin: str) -> tuple[Turns, list[Turns]]:
    """Cut two conversations where they part; each keeps at least its last turn."""
    most = min(map(len, sides)) - 1
    count = next((i for i in range(most) if sides[0][i] != sides[1][i]), most)
    if not count:
        raise RowError(origin, "two conversations that begin differently", "both sides must have one prompt")
    return sides[0][:count], [side[count:] for side in sides]


_PROMPTS = ("prompt", "instruction", "input", "history", "system")
_NUMBERS = ("margin", "score_chosen", "score_rejected")
_CHATS = ("messages", "conversations")
FORMATS_OF: dict[str, dict[str, Format]] = {
    "examples": FORMATS,
    "pairs": {
        "pairs": Format(("chosen", "rejected"), (*_PROMPTS, "conversations", *_NUMBERS), _parse_pair),
        "scored": Format(("completions",), (*_PROMPTS, "chosen", "rejected"), _parse_scored),
    },
    "judged": {"judged": Format(("label",), (*_PROMPTS, *_CHATS, "completion", "output"), _parse_judged)},
}
