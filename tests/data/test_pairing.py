"""Preference rows as tokens: both sides' ids, masks, cuts and counts, and what rows may not say together."""

import json

import pytest

from minitune.data.corpus import Encoding, Source, Stream, load_corpus
from minitune.data.examples import encode_record
from minitune.data.formats import Record, read_records
from minitune.data.pairing import survey_preferences
from minitune.data.preference_formats import FORMATS_OF, PreferenceRecord
from minitune.data.preferences import Judged, Pair
from minitune.errors import ConfigError, DataError

EOS = 258
ANSWERS = ("yes, really", "no")


def pair_row(question="Hi é", chosen="yes", rejected="no"):
    user = {"role": "user", "content": question}
    return {name: [user, {"role": "assistant", "content": text}] for name, text in
            (("chosen", chosen), ("rejected", rejected))}  # fmt: skip


@pytest.fixture
def survey(tmp_path, tokenizers):
    """Return a function from rows to their survey."""

    def survey(*rows, tokenizer="chat", kind="pairs", max_length=1000, truncate="error", train_on="all"):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = read_records(tmp_path / "a.jsonl", formats=FORMATS_OF[kind])
        options = {"max_length": max_length, "truncate": truncate, "train_on": train_on}
        return survey_preferences(records, tokenizers[tokenizer], **options)

    return survey


def texts(example, tokenizer):
    """Return (text before the first target, text of the targets, text after them)."""
    learned = [i for i, target in enumerate(example.targets) if target]
    parts = example.ids[: learned[0]], [example.ids[i] for i in learned], example.ids[learned[-1] + 1 :]
    return tuple(tokenizer.decode(part, skip_special=False) for part in parts)


ASKED = "<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n"


def test_both_sides_are_a_chat_whose_answer_is_learned_to_its_end(survey, tokenizers, judge):
    (pair,) = survey(pair_row()).examples
    assert isinstance(pair, Pair)
    assert texts(pair.chosen, tokenizers["chat"]) == (ASKED, "yes<|im_end|>", "\n")
    assert texts(pair.rejected, tokenizers["chat"]) == (ASKED, "no<|im_end|>", "\n")
    for side, name in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
        expected = judge.apply_chat_template(pair_row()[name], return_dict=True, return_assistant_tokens_mask=True)
        assert list(side.ids) == expected["input_ids"]
        assert [int(target) for target in side.targets] == expected["assistant_masks"]
    assert pair.documents == (pair.chosen, pair.rejected) and pair.origin.endswith("a.jsonl:1")


def test_only_what_follows_the_prompt_is_learned(survey, tokenizers):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
    other = [*turns[:3], {"role": "assistant", "content": "e"}]
    (pair,) = survey({"chosen": turns, "rejected": other}).examples
    assert [texts(side, tokenizers["chat"])[1] for side in pair.documents] == ["d<|im_end|>", "e<|im_end|>"]
    early = [turns[0], {"role": "assistant", "content": "x"}, *turns[2:]]
    (pair,) = survey({"chosen": turns, "rejected": early}).examples
    learned = [texts(side, tokenizers["chat"])[1] for side in pair.documents]
    assert learned == ["b<|im_end|>d<|im_end|>", "x<|im_end|>d<|im_end|>"]
    # the last answer alone would follow different tokens on the two sides
    assert (
        "the prompts of the two sides differ" in survey({"chosen": turns, "rejected": early}, train_on="last").problem()
    )


def test_texts_are_encoded_apart_from_their_prompt(survey, judge):
    for tokenizer, bos in (("plain", []), ("bos", [256])):
        (pair,) = survey({"prompt": "2+2=", "chosen": " 4", "rejected": " 5é"}, tokenizer=tokenizer).examples
        prompt = bos + judge("2+2=")["input_ids"]
        for side, answer in ((pair.chosen, " 4"), (pair.rejected, " 5é")):
            due = judge(answer)["input_ids"] + [EOS]
            assert list(side.ids) == prompt + due
            assert list(side.targets) == [False] * len(prompt) + [True] * len(due)


def test_a_template_that_tells_the_answers_before_they_come_is_refused(with_template):
    telling = with_template("{{ messages[-1].content | length }}")
    sides = tuple(
        Record("a:7", "", ({"role": "user", "content": "q"}, {"role": "assistant", "content": text}), context=1)
        for text in ("ab", "abc")
    )
    survey = survey_preferences(
        [PreferenceRecord("a:7", sides)], telling, max_length=99, truncate="error", train_on="all"
    )
    assert survey.problem().startswith("a:7: message 1: ") and "(prefix property)" in survey.problem()


def test_equal_sides_and_equal_scores_are_counted_and_left_out(survey):
    found = survey(
        pair_row(), pair_row("b", "same", "same"),
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 1},
        tokenizer="chat",
    )  # fmt: skip
    assert (len(found.examples), found.equal, found.tied, found.problem()) == (1, 1, 1, None)
    assert survey(pair_row("b", "s", "s")).problem().startswith("no pair is left: 0 have equal scores, 1 equal sides")


def rows_of(prompt, chosen, rejected):
    """Return a row of texts with so many bytes."""
    letters = "".join(chr(97 + i % 26) for i in range(prompt))
    return {"prompt": letters, "chosen": "y" * chosen, "rejected": "z" * rejected}


def test_over_long_pairs(survey):
    rows = [rows_of(4, 3, 10), rows_of(4, 12, 3), rows_of(4, 3, 3)]  # with EOS at most 15, 17 and 8 tokens
    found = survey(*rows, tokenizer="plain", max_length=14)
    assert found.lengths == [15, 17, 8]
    assert found.problem().startswith("2 of 3 rows are over max_length 14 (tokens: 50% 15, 90% 17")
    assert found.problem().endswith("; raise max_length, choose truncate (prompt or drop), or shorten them")
    dropped = survey(*rows, tokenizer="plain", max_length=14, truncate="drop")
    assert (len(dropped.examples), dropped.dropped, dropped.problem()) == (1, 2, None)
    with pytest.raises(ConfigError, match="truncate split is for texts"):
        survey(*rows, truncate="split")
    with pytest.raises(ConfigError, match="max_length 1"):
        survey(*rows, max_length=1)


@pytest.mark.parametrize(("chosen", "rejected"), [(3, 9), (9, 3)])
@pytest.mark.parametrize(("tokenizer", "head"), [("plain", 0), ("bos", 1)])
def test_a_cut_prompt_is_the_same_on_both_sides(survey, tokenizers, chosen, rejected, tokenizer, head):
    row = rows_of(20, chosen, rejected)
    (whole,) = survey(row, tokenizer=tokenizer).examples
    found = survey(row, tokenizer=tokenizer, max_length=16, truncate="prompt")
    (pair,) = found.examples
    kept = 16 - 9 - 1  # of the prompt, beside the longer answer and its EOS
    prompt = whole.chosen.prompt
    assert found.shortened == 1
    for side, full in zip(pair.documents, whole.documents, strict=True):
        answer = full.ids[len(prompt) :]
        assert side.ids == prompt[:head] + prompt[len(prompt) - kept + head :] + answer
        assert side.targets == (False,) * kept + (True,) * len(answer)
    assert max(len(side.ids) for side in pair.documents) == 16
    over = survey(row, tokenizer=tokenizer, max_length=10, truncate="prompt")
    assert "their answers alone do not fit" in over.problem()


def test_a_cut_chat_is_what_the_shortened_question_gives(survey):
    (whole,) = survey(pair_row("0123456789", *ANSWERS)).examples
    length = max(len(side.ids) for side in whole.documents)
    for lost in range(1, 10):
        (cut,) = survey(pair_row("0123456789", *ANSWERS), max_length=length - lost, truncate="prompt").examples
        (short,) = survey(pair_row("0123456789"[lost:], *ANSWERS)).examples
        assert cut == short


def test_judged_answers(survey, tokenizers):
    found = survey({"prompt": "q", "completion": "a", "label": False}, tokenizer="plain", kind="judged")
    (judged,) = found.examples
    assert isinstance(judged, Judged) and judged.desirable is False
    assert judged.example == encode_record(Record(judged.origin, "", prompt="q", completion="a"), tokenizers["plain"])


def test_ids_are_shared_objects(survey):
    first, second = survey(*[{"prompt": "Ā", "chosen": "ā", "rejected": "b"}] * 2, tokenizer="plain").examples
    assert all(a is b for a, b in zip(first.chosen.ids, second.chosen.ids, strict=True))


@pytest.fixture
def load(tmp_path, tokenizers):
    """Return a function from files of rows to a corpus; the name of a file says what it is for."""

    def load(files, kind="pairs", tokenizer="plain", **options):
        sources = {True: [], False: []}
        for name, rows in files.items():
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            sources[name.startswith("validation")].append(Source(str(tmp_path / name)))
        encoding = Encoding(options.pop("max_length", 60), options.pop("truncate", "error"))
        return load_corpus(sources[False], sources[True], tokenizers[tokenizer], encoding, kind=kind, **options)

    return load


def judged(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_a_corpus_of_pairs_and_its_counts(load):
    rows = [rows_of(4, 3, 5) | {"margin": 1.0}, rows_of(5, 2, 2), rows_of(6, 80, 1),
            {"prompt": "q", "chosen": "a", "rejected": "a"}]  # fmt: skip
    corpus = load({"a.jsonl": rows, "validation.jsonl": [rows_of(7, 1, 1)]}, truncate="drop")
    training, validation = corpus.files
    expected = {"training_examples": 2, "validation_examples": 0, "chosen_tokens": 4 + 3, "rejected_tokens": 6 + 3,
                "target_tokens": 16, "training_tokens": 16 + 2 * 4 + 2 * 5, "margins": 1, "tied": 0, "equal": 1,
                "shortened": 0, "dropped": 1}  # fmt: skip
    assert {name: training[name] for name in expected} == expected
    assert validation["validation_examples"] == 1 and validation["chosen_tokens"] == 2
    assert [pair.margin for pair in corpus.training[0][0]] == [1.0, None]


def test_pairs_are_held_out_by_their_prompt(load):
    rows = [{"prompt": f"q{i % 20}", "chosen": f"a{i}", "rejected": "b"} for i in range(60)]
    corpus = load({"a.jsonl": rows}, held_out=0.3)
    learned, held = ({pair.chosen.prompt for pair in part} for part in (corpus.training[0][0], corpus.validation))
    assert learned and held and not learned & held
    assert len(corpus.training[0][0]) == 3 * len(learned) and len(corpus.validation) == 3 * len(held)
    supervised = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    same = load({"b.jsonl": supervised}, kind="examples", held_out=0.3)
    assert [e.ids for e in same.validation] == [pair.chosen.ids for pair in corpus.validation]
    assert corpus.leaked() == 0


def test_what_stands_on_both_sides_is_counted(load):
    rows = [rows_of(4, 3, 5), rows_of(5, 2, 2)]
    assert load({"a.jsonl": rows, "validation.jsonl": [rows[1], rows_of(5, 2, 3)]}).leaked() == 1


def test_contradictions_are_refused_with_both_places(load, tmp_path):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    swapped = {"prompt": "q", "chosen": "b", "rejected": "a"}
    other = {"prompt": "r", "chosen": "b", "rejected": "a"}
    with pytest.raises(DataError) as caught:
        load({"a.jsonl": [row, row, other, swapped]})
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl:4: a pair that another row has the other way round; remove it or {tmp_path}/a.jsonl:1"
    )
    with pytest.raises(DataError, match=r"validation.jsonl:1: a pair .* remove it or .*a.jsonl:1 \(1 more such row\)"):
        load({"a.jsonl": [row], "validation.jsonl": [swapped, swapped]})
    assert len(load({"a.jsonl": [row, row, other]}).training[0][0]) == 3  # said twice is no contradiction
    good, bad = judged("q", "a", True), judged("q", "a", False)
    with pytest.raises(DataError, match=r"b.jsonl:1: an answer that another row judges the other way; .*a.jsonl:2"):
        load({"a.jsonl": [judged("r", "a", True), good], "b.jsonl": [bad]}, kind="judged")


def test_judged_rows_need_both_labels_and_two_prompts(load):
    good, bad = [judged(f"q{i}", "a", True) for i in range(3)], [judged(f"r{i}", "b", False) for i in range(3)]
    with pytest.raises(DataError, match="no training row has the label false; kto learns from both"):
        load({"a.jsonl": good, "validation.jsonl": bad}, kind="judged")
    with pytest.raises(DataError, match="no training row has the label true"):
        load({"a.jsonl": bad}, kind="judged")
    corpus = load({"a.jsonl": good, "b.jsonl": bad}, kind="judged")  # one file for each label
    assert [(entry["desirable"], entry["undesirable"]) for entry in corpus.files] == [(3, 0), (0, 3)]
    with pytest.raises(DataError, match="a.jsonl:1: all rows have one prompt"):
        load({"a.jsonl": [judged("q", "a", True), judged("q", "b", False)]}, kind="judged")


def test_mismatched_answers_are_those_before_to_another_prompt(load):
    rows = [judged("q", "1", True), judged("q", "22", False), judged("rr", "333", True), judged("s", "4", False)]
    corpus = load({"a.jsonl": rows[:3], "b.jsonl": rows[3:]}, kind="judged")
    items = [item for items, _ in corpus.training for item in items]
    answers = [item.example.ids[len(item.example.prompt) :] for item in items]
    for item, before in zip(items, (3, 3, 1, 2), strict=True):
        assert item.mismatched.ids == item.example.prompt + answers[before]
        assert item.mismatched.targets == (False,) * len(item.example.prompt) + (True,) * len(answers[before])
        assert item.mismatched.origin == item.origin


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["pairs", "judged"])
def test_a_stream_gives_every_item_once_in_an_order_of_seed_and_epoch(load, kind, packing):
    rows = {
        "pairs": [rows_of(2 + i % 7, 1 + i % 3, 1 + i % 5) | {"margin": float(i)} for i in range(50)],
        "judged": [judged("q" * (1 + i % 7), "a" * (1 + i), i % 2 == 0) for i in range(50)],
    }[kind]
    corpus = load({"a.jsonl": rows}, kind=kind)
    items = corpus.training[0][0]
    streams = [Stream(corpus, 4, 60, packing, seed, 0) for seed in (0, 0, 1)]
    counts = [stream.count(1) for stream in streams]
    epochs = [[next_.ids.tolist() for next_, _ in zip(s.batches(0), range(n), strict=False)]
              for s, n in zip(streams, counts, strict=True)]  # fmt: skip
    assert epochs[0] == epochs[1] != epochs[2]
    batches = [batch for batch, _ in zip(streams[0].batches(0), range(counts[0]), strict=False)]
    resumed = next(streams[0].batches(1))
    assert resumed.ids.tolist() == batches[1].ids.tolist()
    seen = []
    for batch in batches:
        for n in range(batch.document_count):
            seen.append(tuple(batch.ids[batch.owners == n].tolist()))
    assert sorted(seen) == sorted(document.ids for item in items for document in item.documents)
    if kind == "pairs":
        assert sorted(m for batch in batches for m in batch.margins.tolist()) == [float(i) for i in range(50)]


def chatml(turns):
    """Return what SmolLM2 reads of turns in from/value or role/content form, written out here by hand."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    if turns[0][0] != "system":
        turns.insert(0, ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"))
    return "".join(f"<|im_start|>{roles.get(role, role)}\n{text}<|im_end|>\n" for role, text in turns)


@pytest.mark.real
def test_llamafactorys_demonstration_sets(smollm2_path):
    """300 rows each; issue 4 says that about a third of the pairs fit 512 tokens."""
    from minitune.sources import fetch
    from minitune.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2_path)
    options = {"max_length": 512, "truncate": "drop", "train_on": "all"}
    start, end = "<|im_start|>assistant\n", "<|im_end|>"
    for name, kind in (("dpo-en-demo", "pairs"), ("kto-en-demo", "judged")):
        path = fetch(name, progress=False)
        rows = json.loads(path.read_text(encoding="utf-8"))
        records = read_records(path, formats=FORMATS_OF[kind])
        survey = survey_preferences(records, tokenizer, **options)
        assert (len(rows), survey.equal, survey.tied, survey.problem()) == (300, 0, 0, None)
        assert len(survey.examples) + survey.dropped == 300
        by_origin = dict(zip([record.origin for record in records], rows, strict=True))
        for item in survey.examples:
            row = by_origin[item.origin]
            turns = row["conversations"] if kind == "pairs" else row["messages"][:-1]
            answers = [row["chosen"], row["rejected"]] if kind == "pairs" else row["messages"][-1:]
            for document, answer in zip(item.documents, answers, strict=True):
                said = answer.get("value", answer.get("content"))
                assert texts(document, tokenizer) == (chatml(turns) + start, said + end, "\n")
        if kind == "pairs":
            assert 90 <= len(survey.examples) <= 110
        else:
            assert all(item.desirable == by_origin[item.origin]["label"] for item in survey.examples)
