"""Cleaning: each fault found where it was put and nowhere else, and nothing changed or removed unasked."""

import re

import pytest

from minitune.curation.cleaning import CleaningOptions, clean
from minitune.curation.faults import FAULTS, repair_control, repair_markup, repair_tracking
from minitune.curation.findings import answers_of, texts_of, with_texts
from minitune.data.formats import Record, detect_format, parse_alpaca
from minitune.data.preference_formats import FORMATS_OF, PreferenceRecord
from minitune.errors import ConfigError

ANSWERS = [
    "Rivers carry sediment downstream and drop it where the current slows.",
    "A sonnet has fourteen lines, often in iambic pentameter.",
    "Use a hash map: each lookup then takes constant time on average.",
    "Sourdough needs a lively starter, patience and a hot oven.",
]


def chat(answer: str, question: str = "Tell me something new", number: int = 1, system: str = "") -> Record:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Record(
        f"d.jsonl:{number}", "messages", messages=(*([{"role": "system", "content": system}] if system else []), *turns)
    )


def chats(*answers: str) -> list[Record]:
    return [chat(answer, f"Question {number} about {answer[:20]}", number) for number, answer in enumerate(answers, 1)]


def kinds(rows: list, **options) -> dict[str, int]:
    return {found.kind: found.count for found in clean(rows, CleaningOptions(**options)).findings}


FAULTY = [
    ("mojibake", "The cafÃ© is open"), ("mojibake", "it\x92s late"),
    ("replacement_character", "the caf\ufffd is open"), ("markup", "Good<br />bad"), ("markup", "<p>Fine.</p>"),
    ("markup", "R&amp;B and soul"), ("markup", "5 &lt; 6 &#39;x&#39;"), ("markup", '<a href="x">home</a>'),
    ("markup", "<!-- nav -->Text"), ("tracking", "see https://a.b/c?id=3&utm_source=mail"),
    ("control_character", "a\u200bb"), ("control_character", "bell\x07"), ("control_character", "\ufeffStart"),
    ("control_character", "soft\u00adhyphen"), ("control_character", "x\u202etxt.exe"),
    ("control_character", "\x1b[31mred\x1b[0m"), ("control_character", "plain\u200e text"),
    ("control_character", "hi\U000e0041\U000e0042"), ("boilerplate", "As an AI language model, I can't."),
    ("boilerplate", "as a large language model I"), ("boilerplate", "This site uses cookies."),
    ("boilerplate", "Click here for more"), ("boilerplate", "Intro: lorem ipsum dolor"),
    ("boilerplate", "Fine.\nAdvertisement\nMore."), ("boilerplate", "© 2018 X. All rights reserved."),
    ("boilerplate", "My knowledge cutoff is 2021"), ("code_fence", "Run:\n```python\nprint(1)"),
    ("code_fence", "```python\n```python\nx\n```\n```"), ("personal_data", "mail ann@corp.com"), ("trivial", "N/A"),
    ("trivial", "..."), ("trivial", "-- todo --"), ("trivial", "None."), ("trivial", "[insert answer here]"),
    ("trivial", "<no output>"), ("unicode", "cafe\u0301"),
]  # fmt: skip
SOUND = [
    "I baked cookies; click the oven on, here it goes.", "if a < b and b > c: x = a[i]",
    "List<String> names; Map<K, V> m", "AT&T and R&D; Q&A", "`<br>` breaks a line", "```html\n<p>Hi</p>\n```",
    "An HTML page starts with <html>", "&c; &nosuch;", "Use <b>bold</b> tags in HTML.", "می‌خواهم بروم",
    "שלום \u200fעולם", "👩\u200d🚀 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "क्\u200dष", "Yes.",
    "42", "+", "😀", "C", "None of them came.", "null hypothesis", "```\nx\n```", "~~~\nx\n~~~",
    "https://a.b/c?id=3&page=2", "The AI modelled as an assistant", "line\n\ttabbed", "café", "½ ﬁne", "x² + y²",
    "Read more books", "All rights are reserved to us",
]  # fmt: skip


@pytest.mark.parametrize("kind,text", FAULTY)
def test_each_fault_is_found_alone(kind, text):
    rows = [*chats(*ANSWERS), chat(text, number=9)]
    found = clean(rows).findings
    assert [(one.kind, one.count, one.rows) for one in found] == [(kind, 1, ("d.jsonl:9",))]
    assert found[0].message and found[0].remedy and "\n" not in found[0].message
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b\u202e]", found[0].message)  # a terminal shows it


@pytest.mark.parametrize("text", SOUND)
def test_sound_texts_raise_nothing(text):
    assert kinds([*chats(*ANSWERS), chat(text, number=9)]) == {}


def test_nothing_changes_unasked():
    rows = [chat(text, number=number) for number, (_, text) in enumerate(FAULTY)]
    done = clean(rows)
    assert done.kept == rows and done.removed == done.changed == []


@pytest.mark.parametrize("kind,text", [(kind, text) for kind, text in FAULTY if kind != "unicode"])
def test_rows_are_removed_on_request_with_the_reason(kind, text):
    rows = [*chats(*ANSWERS), chat(text, number=9)]
    done = clean(rows, CleaningOptions(remove=(kind,)))
    assert done.kept == rows[:-1] and done.removed == [(rows[-1], kind)]
    assert "removed" in done.findings[0].message


REPAIRS = [
    ("mojibake", "The cafÃ© is open", "The café is open"),
    ("markup", "Good<br />bad<BR>&amp; ugly", "Good\nbad\n& ugly"),
    ("markup", "<p>One.</p><p>Two &lt;3</p>", "One.\nTwo <3"),
    ("markup", "<script>var x = 1;</script>Text", "Text"),
    ("markup", "Write &amp; run `a &amp; b`:\n```\n<p>\n```", "Write & run `a &amp; b`:\n```\n<p>\n```"),
    ("tracking", "a https://a.b/c?id=3&utm_source=m&utm_x=y b", "a https://a.b/c?id=3 b"),
    ("tracking", "https://a.b/?fbclid=1&id=2#top", "https://a.b/?id=2#top"),
    ("tracking", "(https://a.b/?gclid=xyz)", "(https://a.b/)"),
    ("tracking", "Why? Q & A: https://a.b/?utm_source=a&q=b Is it? Yes", "Why? Q & A: https://a.b/?q=b Is it? Yes"),
    ("markup", "<p>a.b/?x=1&currency=USD&copy=2 &copy; &eacute;</p>", "a.b/?x=1&currency=USD&copy=2 © é"),
    ("markup", "if a <b and b> c<br>then", "if a <b and b> c\nthen"),
    ("control_character", "a\u200bb \ufeffc\x07d e\x0b f", "ab c d e f"),
    ("control_character", "\x1b[1;31mred\x1b[0m", "red"),
    ("personal_data", "mail ann@corp.com or +1 212 555 0187", "mail [EMAIL] or [PHONE]"),
]


@pytest.mark.parametrize("kind,before,after", REPAIRS)
def test_repairs(kind, before, after):
    row = chat(before, number=9)
    done = clean([*chats(*ANSWERS), row], CleaningOptions(repair=(kind,)))
    assert texts_of(done.kept[-1])[-1] == after
    assert done.changed == [(done.kept[-1], kind)] and not done.removed
    assert "repaired" in done.findings[0].message
    assert texts_of(row)[-1] == before
    again = clean(done.kept, CleaningOptions(repair=(kind,)))
    assert again.changed == [] and again.findings == []


def test_repairs_leave_sound_texts_alone():
    for text in [*SOUND, *ANSWERS]:
        assert repair_control(text) == text and repair_tracking(text) == text
    for kind, fault in FAULTS.items():
        if fault.repair and kind != "markup":  # which rows that speak of markup never come to
            assert all(fault.repair(text) == text for text in SOUND)
    assert repair_control("it\x92s\u200b here") == "it\x92s here"  # what the repair of mojibake makes an apostrophe
    assert repair_markup("a < b, AT&T") == "a < b, AT&T"


def test_a_text_that_a_repair_empties_goes_with_its_row():
    done = clean([chat("<br />", number=1), *chats(*ANSWERS)[1:]], CleaningOptions(repair=("markup",)))
    assert [(row.origin, reason) for row, reason in done.removed] == [
        ("d.jsonl:1", "markup: nothing else in one of its texts")
    ]
    assert len(done.kept) == 3


def test_unicode_is_off_counted_and_shown():
    rows = [*chats(*ANSWERS), chat("cafe\u0301", number=9), chat("ﬁne ½", number=10)]
    found = {one.kind: one for one in clean(rows).findings}
    assert found["unicode"].rows == ("d.jsonl:9",) and "'e\\u0301'" in found["unicode"].message
    done = clean(rows, CleaningOptions(unicode="NFC"))
    assert [what for _, what in done.changed] == ["NFC"] and texts_of(done.kept[4])[-1] == "café"
    done = clean(rows, CleaningOptions(unicode="NFKC"))
    assert texts_of(done.kept[5])[-1] == "fine 1⁄2" and len(done.changed) == 2


def test_exact_and_near_duplicates_the_first_stays():
    long = "The river was wide and slow that summer and we crossed it by the old ferry before the mist had gone"
    rows = chats(*ANSWERS, long, long.replace("old", "new"), ANSWERS[0], ANSWERS[1].upper())
    for number in (4, 5):
        rows[number] = with_texts(rows[number], lambda text: "Tell a story" if text.startswith("Question") else text)
    rows[6] = chat(ANSWERS[0], texts_of(rows[0])[0], 7)
    rows[7] = chat(ANSWERS[1].upper() + " ", texts_of(rows[1])[0], 8)
    done = clean(rows, CleaningOptions(threshold=0.7))
    found = {one.kind: one for one in done.findings}
    assert found["exact_duplicate"].rows == ("d.jsonl:7", "d.jsonl:8")
    assert found["near_duplicate"].rows == ("d.jsonl:6",) and "d.jsonl:6 = d.jsonl:5" in found["near_duplicate"].message
    words = set(zip(*(("tell a story " + long).lower().split()[i:] for i in range(3)), strict=False))
    assert done.near[0][2] == pytest.approx((len(words) - 3) / (len(words) + 3))  # one word is in three shingles
    done = clean(rows, CleaningOptions(threshold=0.7, remove=("exact_duplicate", "near_duplicate")))
    assert done.kept == rows[:5] and len(done.removed) == 3


LONG = "the ferry left the harbour at noon and came back over the wide river before the mist had gone that summer day "
YES, NO = "yes it is so and well done my good old friend", "no that was never true nor will it be any time soon"
OTHERWISE = {
    "labels": ("examples", {"instruction": LONG, "output": "positive"}, {"instruction": LONG, "output": "negative"}),
    "numbers": (
        "examples", {"instruction": LONG + "20", "output": "-600"}, {"instruction": LONG + "30", "output": "600"},
    ),
    "a pair the other way round": (
        "pairs", {"prompt": LONG, "chosen": YES, "rejected": NO}, {"prompt": LONG, "chosen": NO, "rejected": YES},
    ),
    "another verdict": (
        "judged", {"prompt": LONG, "completion": YES, "label": True},
        {"prompt": LONG, "completion": YES, "label": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind,one,other", OTHERWISE.values(), ids=OTHERWISE)
def test_rows_that_answer_otherwise_are_no_duplicates(kind, one, other):
    formats = FORMATS_OF[kind]
    rows = [formats[detect_format(row, "d:1", formats)].parse(row, f"d:{i}") for i, row in enumerate((one, other, one))]
    done = clean(rows, CleaningOptions(threshold=0.7, remove=("exact_duplicate", "near_duplicate")))
    assert done.kept == rows[:2] and [reason for _, reason in done.removed] == ["exact_duplicate"]


def test_of_a_chain_both_ends_stay():
    words = [f"w{number}" for number in range(40)]
    rows = [" ".join([f"x{i}" for i in range(step)] + words[step:]) for step in (0, 4, 8)]  # each 4 words further
    done = clean(chats(*rows), CleaningOptions(threshold=0.6, remove=("near_duplicate",)))
    assert [texts_of(row)[-1] for row in done.kept] == [rows[0], rows[2]]


def test_duplicates_after_repair_count():
    rows = [chat("The café is open today", number=1), chat("The cafÃ© is open today", number=2)]
    assert "exact_duplicate" not in kinds(rows)
    assert kinds(rows, repair=("mojibake",))["exact_duplicate"] == 1


def test_labels_are_never_trivial():
    rows = [chat("+" if number % 2 else "...", f"Is {number * 7919} good?", number) for number in range(30)]
    assert "trivial" not in kinds(rows)
    assert kinds([*chats(*ANSWERS), chat("fine", "?", 9)]) == {"trivial": 1}
    assert kinds([*chats(*ANSWERS), chat("N/A", "Where?", 9), chat("N/A", "When?", 10)]) == {"trivial": 2}


def test_every_kind_of_record():
    alpaca = parse_alpaca({"instruction": "Say\u200b it", "output": "CafÃ©"}, "a:1")
    sides = (Record("p:1", "", prompt="Q", completion="<br>good"), Record("p:1", "", prompt="Q", completion="R&amp;B"))
    pair, text = PreferenceRecord("p:1", sides), Record("t:1", "text", text="ann@corp.com")
    options = CleaningOptions(repair=("mojibake", "markup", "control_character", "personal_data"))
    done = clean([alpaca, pair, text], options)
    assert texts_of(done.kept[0]) == ["Say it", "Café"] and "Say it" in done.kept[0].prompt
    assert done.kept[0].completion == "Café"
    assert texts_of(done.kept[1]) == ["Q", "good", "Q", "R&B"] and answers_of(done.kept[1]) == ["good", "R&B"]
    assert texts_of(done.kept[2]) == ["[EMAIL]"]
    assert clean([]).findings == []


def test_boilerplate_in_a_prompt_is_its_subject():
    assert kinds([chat("Spam.", "Is this spam: Click here!")]) == {}


@pytest.mark.parametrize(
    "options,message",
    [
        ({"repair": ("markup",), "remove": ("markup",)}, "markup is both repaired and removed"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"shingle": 0}, "shingle is 0"),
    ],
)
def test_options_without_meaning(options, message):
    with pytest.raises(ConfigError, match=message):
        CleaningOptions(**options)
