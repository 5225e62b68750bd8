"""Causes that lie in the data, each a function of a run's facts -> Finding or None. Thresholds and their reasons:

FEW_ROWS 50, FEW_TARGETS 100   guides for fine-tuning begin at 50 to 100 rows; a word and its end are two targets
MAJORITY 0.8                   answering always the same is right in four of five rows, so that is what is learned
COPIES 0.2                     a fifth of the rows at double weight; 5% are usual in crawled data (a note)
CONTRADICTED 0.1, FREE 0.3     labels have one right answer; of free texts some questions rightly have several
LEAKED 0.02                    one validation row in 50 moves its mean loss by what training gains in an epoch
MARKED 0.05                    a few texts may be about templates; one in twenty is a format
CUT 0.1                        one answer is the longest, a few may tie; a tenth at the limit were cut there
LOST 0.1                       rows left out or shortened: beyond that the result is of other data than was given
"""

from minitune.errors import counted
from minitune.reporting.findings import DATA, NOTE, Finding, ranked
from minitune.reporting.record import Run

FEW_ROWS, FEW_TARGETS = 50, 100
MAJORITY, COPIES, CONTRADICTED, FREE, LEAKED, MARKED, CUT, LOST = 0.8, 0.2, 0.1, 0.3, 0.02, 0.05, 0.1, 0.1
SOME_COPIES = 0.05
SHORTEST_CUT = {"characters": 16, "words": 4, "tokens": 8}  # a limit below these would be no text
FEW_VALIDATION = 20


def template_mismatch(run: Run) -> Finding | None:
    """Texts with the marks of a template in a model that has one of its own: they are read as letters, not as turns."""
    found, seen = run.data.get("markup"), run.data.get("looked_at")
    if not found or found["count"] < MARKED * seen:
        return None
    return Finding(
        "template mismatch",
        f"facts.json: {found['count']} of {seen} rows have {found['mark'].strip()!r} ({found['format']}) in their "
        f"text, the first {found['origin']}; the model has a chat template of its own, which writes the turns",
        "give the turns as messages or prompt and completion, without marks; the model's template adds its own",
        ranked(DATA, 0.9 + found["count"] / seen / 10),
    )


def never_ends(run: Run) -> Finding | None:
    """Answers whose last target ends no turn: the model is never taught to stop."""
    count, rows = run.data.get("unended", 0), run.data.get("documents", 0)
    if not rows or count < 0.5 * rows:
        return None
    return Finding(
        "EOS never learned",
        f"facts.json: {count} of {counted(rows, 'training document')} do not end with a token that ends a turn",
        "use the tokenizer's own chat template, or one that writes its end-of-turn token after every answer",
        ranked(DATA, 1),
    )


def leak(run: Run) -> Finding | None:
    """Validation rows that were trained on: the loss on them proves nothing."""
    count, rows = run.data.get("leaked", 0), run.data.get("validation_rows", 0)
    if not rows or count < LEAKED * rows:
        return None
    return Finding(
        "validation rows in the training data",
        f"facts.json: {count} of {counted(rows, 'validation row')} stand among the training rows too",
        "split by python -m minitune.prepare FILE --output FOLDER, or leave --validation out: a part is held out then",
        ranked(DATA, 0.85 + count / rows / 10),
    )


def contradictions(run: Run) -> Finding | None:
    """Equal questions with different answers: no model can be right."""
    count, rows, labels = run.data.get("contradicted", 0), run.data.get("rows", 0), run.data.get("labels")
    share = count / max(rows, 1)
    if share < CONTRADICTED:
        return None
    alarm = labels or share >= FREE
    return Finding(
        "contradictory answers",
        f"facts.json: {count} of {counted(rows, 'training row')} have a question that another row answers otherwise",
        "decide for one answer to a question; python -m minitune.prepare lists the rows",
        ranked(DATA, 0.7 + share / 10) if alarm else ranked(NOTE, share),
    )


def imbalance(run: Run) -> Finding | None:
    """One answer that is nearly always right."""
    labels = run.data.get("labels")
    if not labels:
        return None
    total = sum(labels.values())
    name, most = max(labels.items(), key=lambda entry: entry[1])
    if most < MAJORITY * total:
        return None
    fewest = min(labels.items(), key=lambda entry: entry[1])
    rest = f"; {fewest[0]!r} has {fewest[1]}" if len(labels) > 1 else ", and no row has another one"
    return Finding(
        "label imbalance",
        f"facts.json: {most} of {counted(total, 'training row')} have the answer {name!r} ({most / total:.0%}){rest}",
        "add rows of the rarer labels, or repeat them by weight (data: [{path: rare.jsonl, weight: ...}]); judge by "
        "macro_f1, not by accuracy",
        ranked(DATA, 0.5 + (most / total - MAJORITY)),
    )


def copies(run: Run) -> Finding | None:
    """Rows that are there several times."""
    count, rows = run.data.get("copies", 0), run.data.get("rows", 0)
    share = count / max(rows, 1)
    if share < SOME_COPIES:
        return None
    return Finding(
        "duplicates",
        f"facts.json: {count} of {counted(rows, 'training row')} are copies of another one ({share:.0%})",
        "leave them out: python -m minitune.prepare lists them, and --clean.remove removes; for more passes set epochs",
        ranked(DATA, 0.3 + share / 10) if share >= COPIES else ranked(NOTE, share),
    )


def cut_answers(run: Run) -> Finding | None:
    """Many answers that end at one and the same greatest length."""
    found, asked = run.data.get("cut"), min(run.data.get("asked", 0), run.data.get("looked_at", 0))
    if not found or found["count"] < max(5, CUT * asked) or found["different"] < 5:
        return None
    if found["length"] < SHORTEST_CUT[found["unit"]]:
        return None
    share = found["count"] / asked
    return Finding(
        "truncated answers",
        f"facts.json: {found['count']} of {counted(asked, 'answer')} have the greatest length, exactly "
        f"{found['length']} {found['unit']}: they were cut there before training",
        "give the answers whole; raise the limit of the step that wrote the data, and max_length with it",
        ranked(DATA, 0.6 + share / 10),
    )


def lost_rows(run: Run) -> Finding | None:
    """Rows that max_length left out or shortened."""
    files = [file for file in run.files if file.get("role") == "training"]
    kept = sum(file.get("training_examples", 0) + file.get("validation_examples", 0) for file in files)
    dropped, cut = (sum(file.get(name, 0) for file in files) for name in ("dropped", "shortened"))
    limit = run.options.get("max_length")
    if dropped >= LOST * max(kept + dropped, 1):
        evidence = f"{dropped} of {counted(kept + dropped, 'row')} are over max_length {limit} and were left out"
    elif cut >= LOST * max(kept, 1) and run.options.get("truncate") == "prompt":
        evidence = f"of {cut} of {counted(kept, 'row')} the start was cut off to fit into max_length {limit}"
    else:
        return None
    share = max(dropped / max(kept + dropped, 1), cut / max(kept, 1))
    remedy = "raise max_length (python -m minitune.prepare shows the lengths), or shorten the rows by their meaning"
    severity = 0.4 + 0.6 * share  # what was cut made copies and contradictions of rows that were none
    return Finding("rows cut to fit", f"data.json: {evidence}", remedy, ranked(DATA, severity))


def few_targets(run: Run) -> Finding | None:
    """Too little to learn from."""
    rows, targets = run.data.get("rows"), run.data.get("target_tokens", 0)
    if rows is None or rows >= FEW_ROWS and targets >= FEW_TARGETS:
        return None
    if rows < FEW_ROWS and run.data.get("asked", 0) == 0 and targets >= FEW_TARGETS * 10:
        return None  # a few long texts
    return Finding(
        "too few targets",
        f"facts.json: {counted(rows, 'training row')} with {counted(targets, 'target token')}; below {FEW_ROWS} rows "
        f"or {FEW_TARGETS} targets a model repeats them rather than learns from them",
        "give more rows: 50 to 100 good ones are the least, some hundreds are usual; or put these into the prompt",
        ranked(DATA, 0.2 + (FEW_ROWS - min(rows, FEW_ROWS)) / FEW_ROWS / 10),
    )


def without_template(run: Run) -> Finding | None:
    """Prompts that a chat model sees without its template."""
    count, rows = run.data.get("untemplated"), run.data.get("asked", 0)
    if not count or count < 0.5 * rows:
        return None
    return Finding(
        "prompts without the chat template",
        f"facts.json: {count} of {counted(rows, 'prompt')} have none of the model's turn tokens",
        "ask as in training, by --raw; or give rows as messages, so that the template stands around them",
        ranked(NOTE, 0.5),
    )


def small_validation(run: Run) -> Finding | None:
    """Too few rows, or none, to see over-fitting with."""
    rows = run.data.get("validation_rows")
    if rows is None or rows >= FEW_VALIDATION:
        return None
    remedy = "raise validation_fraction, or give a --validation file of a hundred rows or more"
    return Finding("few validation rows", f"facts.json: there are {rows}", remedy, ranked(NOTE, 0.2))


RULES = (template_mismatch, never_ends, leak, contradictions, imbalance, copies, cut_answers, lost_rows, few_targets,
         without_template, small_validation)  # fmt: skip
