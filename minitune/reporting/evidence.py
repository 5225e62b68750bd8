"""What a run writes down of its data before the first step, so that its end can be explained from its folder alone.

Everything is counted on the examples as the loop will see them, token ids and targets, and not on the files: two rows
that a template makes equal are copies, whatever their files say. Texts are looked at in at most `LOOKED_AT` rows,
spread over the data. Reading the files again when a run is explained was rejected: they may have changed, or gone.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from minitune.data.corpus import Corpus
from minitune.data.examples import Example
from minitune.data.preferences import Item, item_ids
from minitune.data.reading import data_path
from minitune.errors import CheckpointError
from minitune.files import read_json

LOOKED_AT = 1000
LINT = ("level", "kind", "count", "message", "remedy")
MOST_LABELS = 20  # different answers that can still be labels
FORMATS = {  # what another template, or none, would have written around the turns
    "ChatML": ("<|im_start|>", "<|im_end|>"), "Llama 2 or Mistral": ("[INST]", "[/INST]", "<<SYS>>"),
    "Llama 3": ("<|start_header_id|>", "<|eot_id|>"), "Gemma": ("<start_of_turn>", "<end_of_turn>"),
    "Phi or Zephyr": ("<|user|>", "<|assistant|>"), "Alpaca": ("### Instruction:", "### Response:"),
    "a transcript": ("\nHuman:", "\nAssistant:", "### Human:", "### Assistant:"),
    "EOS as text": ("</s>", "<|endoftext|>"),
}  # fmt: skip


def data_facts(corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    """Return what is known of a run's data; counts are of training rows (items) unless they say otherwise.

    `copies`: rows equal to an earlier one. `contradicted`: rows whose question also has another answer. `labels`: how
    often each answer comes, None where answers are no labels. `unended`: documents that do not end with a token that
    ends a turn. `untemplated`: rows without a control token of the chat template, None where there is no template.
    `cut`: answers that end at one and the same greatest length. `markup`: rows whose text has the marks of a template.
    """
    items = [item for part, _ in corpus.training for item in part]
    documents = [document for item in items for document in item.documents]
    supervised = isinstance(items[0], Example)
    asked = [document for document in documents if document.targets.index(True) > 1]
    ends = frozenset(tokenizer.end_ids)
    whole = [document for document in documents if "(window " not in document.origin]
    seen = spread(documents)
    return {
        "rows": len(items),
        "validation_rows": len(corpus.validation),
        "tokens": sum(len(document.ids) for document in documents),
        "target_tokens": sum(sum(document.targets) for document in documents),
        "copies": len(items) - len({item_ids(item) for item in items}),
        "leaked": corpus.leaked(),
        "asked": len(asked),
        "documents": len(whole),
        "unended": sum(last_target(document) not in ends for document in whole),
        "contradicted": contradicted(asked) if supervised else 0,
        "labels": label_counts(asked, tokenizer) if supervised and len(asked) == len(items) else None,
        "untemplated": untemplated(asked, tokenizer),
        "looked_at": len(seen),
        "cut": cut_answers([document for document in seen if document.targets.index(True) > 1], tokenizer),
        "markup": markup(seen, tokenizer),
    }


def prepared_findings(files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what `python -m minitune.prepare` found in the files that it wrote: {"path", "level", "kind", ...}.

    Another report.json that happens to lie beside a file tells nothing.
    """
    found = []
    for path in dict.fromkeys(file["path"] for file in files):
        try:
            findings = read_json(data_path(path).with_name("report.json"), optional=True).get("findings")
        except CheckpointError:
            continue
        for one in findings if isinstance(findings, list) else ():
            if isinstance(one, dict) and set(LINT) <= one.keys():
                found.append({"path": path, **{name: one[name] for name in LINT}})
    return found


def spread(items: Sequence[Item]) -> list[Item]:
    """Return at most `LOOKED_AT` of the items, evenly apart."""
    return list(items[:: -(-len(items) // LOOKED_AT)])


def last_target(document: Example) -> int:
    """Return the last id that is learned."""
    return document.ids[max(i for i, learned in enumerate(document.targets) if learned)]


def answer_of(document: Example) -> tuple[int, ...]:
    """Return the ids that are learned."""
    return tuple(token for token, learned in zip(document.ids, document.targets, strict=True) if learned)


def contradicted(documents: Sequence[Example]) -> int:
    """Return how many documents have a prompt that another one answers otherwise."""
    answers = defaultdict(set)
    for document in documents:
        answers[document.prompt].add(answer_of(document))
    return sum(len(answers[document.prompt]) > 1 for document in documents)


def label_counts(documents: Sequence[Example], tokenizer: Any) -> dict[str, int] | None:
    """Return how often each answer comes, most often first; None where too many are different to be labels."""
    counts = Counter(map(answer_of, documents))
    if not counts or len(counts) > min(MOST_LABELS, max(2, len(documents) // 5)):
        return None
    return {tokenizer.decode(answer): count for answer, count in counts.most_common()}


def untemplated(documents: Sequence[Example], tokenizer: Any) -> int | None:
    """Return how many prompts have no control token but BOS, None where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        return None
    turns = frozenset(tokenizer.control_ids.values()) - {tokenizer.bos_id}
    return sum(turns.isdisjoint(document.prompt) for document in documents)


def cut_answers(documents: Sequence[Example], tokenizer: Any) -> dict[str, Any] | None:
    """Return {"length", "unit", "count"} of the greatest length of answers, in the unit in which most have just that.

    Written answers have one longest among them; a limit somewhere upstream makes many, all without an end.
    """
    texts = [tokenizer.decode(answer_of(document)) for document in documents]
    lengths = {"characters": [len(text) for text in texts], "words": [len(text.split()) for text in texts],
               "tokens": [sum(document.targets) for document in documents]}  # fmt: skip
    found = [
        {"length": max(values), "unit": unit, "count": values.count(max(values)), "different": len(set(values))}
        for unit, values in lengths.items()
        if values
    ]
    return max(found, key=lambda one: one["count"], default=None)


def markup(documents: Sequence[Example], tokenizer: Any) -> dict[str, Any] | None:
    """Return {"format", "mark", "count", "origin"} of the marks that most texts have, None where none has any.

    Control tokens are left out: what is found was written by a row and not by the template.
    """
    if tokenizer.chat_template is None:
        return None
    counts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for document in documents:
        text = tokenizer.decode(document.ids)
        for name, marks in FORMATS.items():
            if mark := next((mark for mark in marks if mark in text), None):
                counts[name].append((mark, document.origin))
    if not counts:
        return None
    name, hits = max(counts.items(), key=lambda entry: len(entry[1]))
    return {"format": name, "mark": hits[0][0], "count": len(hits), "origin": hits[0][1]}
