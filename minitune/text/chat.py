"""A conversation as token ids, with a mark on each token that the model is to learn.

    full   = template(messages)                         what the model sees
    before = template(messages[:i] + prompt to answer)  what it sees when it has to write message i
    after  = template(messages[:i + 1])
    target = full[len(before) : end of the last control token that `after` and `full` begin with]

So the targets come from the rendering itself: they hold the answer and the token that ends its turn, which is how
a model learns to stop. `full` is cut at the start of each answer before it becomes ids, as it is at inference, where
the answer's first token comes from the model. That needs `before` to be a prefix of `after`, and `after` of `full`,
up to the end of the turn, behind which `after` may have control tokens but no text; a template that breaks this
would train what is never seen, so it is refused. Rejected: searching the ids of a "response template" (fails
silently), and `{% generation %}` (few templates have it).

What is to steer an answer must be seen with it: a template that leaves out a system message, a tool's answer or the
tools themselves is refused too.

User text cannot forge a turn: a private-use character is put behind each character with which a control token can
begin, before rendering. What then still looks like a control token was written by the template.
"""

import json
import re
from dataclasses import dataclass
from os.path import commonprefix

from minitune.errors import ConfigError, DataError, nearest, type_name
from minitune.text.templates import ChatTemplate
from minitune.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MARKUP = re.compile(r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation: its text, whether it is learned, whether it is a control token."""

    text: str
    target: bool
    control: bool


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids; `targets[i]` says whether token i is to be learned (predicted from those before it)."""

    ids: list[int]
    targets: list[bool]


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    add_generation_prompt: bool = False,
    train_on: str = "all",
) -> Rendered:
    """Return ids and targets of a conversation.

    `messages` are `{"role", "content"}` dicts as chat templates take them, `tools` the JSON schemas of functions that
    the model may call, for templates that take them. `train_on`: learn "all" answers or the "last" one. With
    `add_generation_prompt` the ids end where the model has to write, and nothing is a target.
    Raises DataError where the conversation, or the template for it, cannot be used; CheckpointError where the
    template is at fault.
    """
    options = {"add_generation_prompt": add_generation_prompt, "train_on": train_on}
    segments = render_segments(tokenizer, messages, tools=tools, **options)
    ids: list[int] = []
    targets: list[bool] = []
    place = "start"
    for segment in segments:
        if segment.control:
            run, place = tokenizer.encode(segment.text, bos=False, control=True), "control"
        else:
            run, place = tokenizer.encode_run(segment.text, place), "inside"
        ids += run
        targets += [segment.target] * len(run)
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        raise DataError(f"{tokenizer.chat_template.name} writes the BOS token twice; remove one from it")
    complete = tokenizer.with_bos(ids)
    return Rendered(complete, [False] * (len(complete) - len(ids)) + targets)


def render_segments(
    tokenizer: Tokenizer,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    add_generation_prompt: bool = False,
    train_on: str = "all",
) -> list[Segment]:
    """Return the rendered conversation cut at control tokens and at the answers' ends; see `render_chat`."""
    if tokenizer.chat_template is None:
        raise DataError(f"{tokenizer.origin} has no chat template; train it on prompt/completion or text rows")
    if train_on not in ("all", "last"):
        raise ConfigError(f"train_on is {train_on!r}; known: 'all', 'last'")
    _check(messages)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    cuts = [(len(messages), add_generation_prompt), *((i, True) for i in answers), *((i + 1, False) for i in answers)]
    marker, marked, marked_tools = _mark(tokenizer, messages, tools)
    variables = tokenizer.special | {"tools": marked_tools}
    full, *rest = tokenizer.chat_template.render(marked, cuts, variables)
    if isinstance(full, Exception):
        raise full
    _check_complete(tokenizer.chat_template, marked, cuts[0], variables, full)
    learned = [] if add_generation_prompt else answers if train_on == "all" else answers[-1:]
    spans: list[tuple[int, int, bool]] = []
    for i, before, after in zip(answers, rest, rest[len(answers) :], strict=False):
        try:
            start, end = _answer(tokenizer, full, before, after, spans[-1][1] if spans else 0)
        except DataError as error:
            if i in learned:
                raise DataError(f"message {i}: {error}") from error
            continue  # only context: it is written as the template writes it
        spans.append((start, end, i in learned))
    segments, at = [], 0
    for start, end, target in spans:
        segments += [(full[at:start], False), (full[start:end], target)]
        at = end
    return [
        Segment(part, target, control)
        for text, target in [*segments, (full[at:], False)]
        for part, control in _split(tokenizer, text, marker)
    ]


def _check(messages: list[dict]) -> None:
    if not messages:
        raise DataError("a conversation without messages; give at least one")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError(f"message {i}: role {role!r}; known: {', '.join(ROLES)}{nearest(str(role), ROLES)}")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise DataError(f"message {i}: 'content' is {type_name(message.get('content'))}, not text")


def _check_complete(
    template: ChatTemplate, messages: list[dict], cut: tuple[int, bool], variables: dict, full: str
) -> None:
    """Raise DataError where the rendering `full` leaves out what is to steer the answers.

    A text that stands in it is there; of another one, written as JSON perhaps, the rendering without it decides.
    """
    remedy = "; put it into a user message, or use another template"
    for i, message in enumerate(messages):
        content = message.get("content")
        if message["role"] in ("user", "assistant") or not content:
            continue
        if isinstance(content, str) and content.strip() in full:
            continue
        emptied = [*messages[:i], {**message, "content": ""}, *messages[i + 1 :]]
        if template.render(emptied, [cut], variables) == [full]:
            raise DataError(f"message {i}: {template.name} leaves out what the {message['role']} says{remedy}")
    if variables["tools"] and template.render(messages, [cut], variables | {"tools": None}) == [full]:
        raise DataError(f"{template.name} takes no tools; leave them out, or use another template")


def _mark(tokenizer: Tokenizer, messages: list[dict], tools: list[dict] | None) -> tuple[str, list[dict], list | None]:
    """Return a character that occurs nowhere; messages and tools with it behind each possible start of a control token.

    Markup that the template itself looks for in texts (`</think>`) and that is no control token stays whole.
    """
    source, literals = tokenizer.chat_template.source, tokenizer.control_ids
    try:
        written = json.dumps([messages, tools])
    except (TypeError, ValueError) as error:
        raise DataError(f"a conversation must be plain JSON values ({error})") from error
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in source)
    marker = next(c for c in free if json.dumps(c)[1:-1] not in written)
    kept = {found for found in MARKUP.findall(source) if found not in literals}
    starts = {literal[0] for literal in literals}
    pattern = re.compile(f"(?!{_any_of(kept)})(?:{_any_of(starts)})")

    def walk(value):
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0] + marker, value)
        if isinstance(value, dict):
            return {walk(key): walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

    return marker, [walk(message) | {"role": message["role"]} for message in messages], walk(tools)


def _any_of(literals: set[str]) -> str:
    return "|".join(re.escape(literal) for literal in sorted(literals)) or "(?!)"


def _answer(tokenizer: Tokenizer, full: str, before: object, after: object, earliest: int) -> tuple[int, int]:
    """Return (start, end) of an answer in `full`, its end-of-turn token included; DataError where there is none.

    `earliest` is where the answer before it ended.
    """
    name = tokenizer.chat_template.name
    for rendering in (before, after):
        if isinstance(rendering, Exception):
            raise DataError(str(rendering))
    if not after.startswith(before):
        raise DataError(
            f"{name} begins this answer otherwise than the prompt it gives the model to answer (prefix"
            " property), so what is trained would never be seen; use another template"
        )
    same = len(commonprefix([after, full]))  # Phi-3.5 writes one more control token behind the last turn
    parts = tokenizer.split_control(after[len(before) : same])
    last = max((n for n, (_, id) in enumerate(parts) if id is not None), default=-1)
    end = len(before) + sum(len(text) for text, _ in parts[: last + 1])
    beyond = "".join(text for text, id in tokenizer.split_control(after[end:]) if id is None)
    if same == len(after) and (last < 0 or beyond.strip()):
        raise DataError(f"{name} writes no end-of-turn token after the answer; the model would never stop")
    if last < 0 or beyond.strip() or len(before) < earliest:
        raise DataError(
            f"{name} writes this answer differently once later turns follow (prefix property);"
            " train on the last answer only: train_on='last'"
        )
    return len(before), end


def _split(tokenizer: Tokenizer, text: str, marker: str) -> list[tuple[str, bool]]:
    """Cut a marked rendering at the template's control tokens and take the marks out: (text, is control)."""
    escaped = json.dumps(marker)[1:-1]  # as a template writes it with tojson(ensure_ascii=true)
    unmarked = ((part.replace(marker, "").replace(escaped, ""), id) for part, id in tokenizer.split_control(text))
    return [(part, id is not None) for part, id in unmarked if part]
