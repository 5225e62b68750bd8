"""Answers against references: what is asked, what counts, and ten kinds of input that must not score as if right."""

import json
import math

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from minitune.checkpoint.load import load_model, load_tokenizer
from minitune.data.examples import encode_record
from minitune.decoding import Answer
from minitune.errors import ConfigError, DataError
from minitune.evaluation.bootstrap import mean_of
from minitune.evaluation.references import (
    METRICS,
    ask,
    ask_repeatedly,
    metric_names,
    prompt_of,
    read_references,
    reference_of,
    score_answers,
    score_likelihood,
    score_passes,
    summary,
)
from minitune.evaluation.scores import Measured, numbers, report, score_lines, share

ROWS = [("Say A.", "the cat sat on the mat"), ("Say B.", "a dog"), ("Say C.", '{"a": 1}'), ("Say D.", "yes")]


@pytest.fixture
def file(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return path

    return write


@pytest.fixture
def rows(file):
    return file([{"prompt": prompt, "completion": answer} for prompt, answer in ROWS])


def answers(*texts: str, finished: bool = True) -> list[Answer]:
    return [Answer(text, len(text.split()), finished) for text in texts]


def test_every_metric_of_answers_is_that_of_the_fields_tools(rows):
    texts = ["the cat sat on a mat", " a dog\n", "{'a': 1}", ""]
    task = read_references(rows, "exact_match,rouge,bleu,chrf,chrf++,length,repetition,format", "json")
    found = score_answers(task, answers(*texts))
    assert {*found} == {*METRICS} - {"verified", "score", "token_accuracy", "perplexity", "bits_per_byte"}
    assert found["exact_match"].right == (False, True, False, False)
    assert found["format"].right == (False, False, False, False)
    scorer, references = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"]), [answer for _, answer in ROWS]
    for kind in scorer.rouge_types:
        peers = [scorer.score(right, text)[kind].fmeasure for right, text in zip(references, texts, strict=True)]
        assert found[kind].statistics.value == pytest.approx(sum(peers) / 4)
    stripped = [text.strip() for text in texts]
    for name, peer in (("bleu", BLEU()), ("chrf", CHRF()), ("chrf++", CHRF(word_order=2))):
        assert found[name].statistics.value == pytest.approx(peer.corpus_score(stripped, [references]).score)
    assert found["length"].statistics.value == pytest.approx((6 + 2 + 2 + 0) / 4)


def test_an_answer_that_was_cut_off_or_is_empty_is_counted_and_never_right(rows):
    task = read_references(rows, "exact_match,format,rouge1", "regex:.*")
    right = [answer for _, answer in ROWS]
    assert score_answers(task, answers(*right))["exact_match"].right == (True,) * 4
    cut = score_answers(task, answers(*right, finished=False))
    assert cut["exact_match"].right == cut["format"].right == (False,) * 4
    assert cut["rouge1"].statistics.value == 1  # its words are compared as far as they go
    empty = answers("", " ", "\n", "")
    assert score_answers(task, empty)["exact_match"].right == (False,) * 4
    assert score_answers(task, empty)["format"].right == (False,) * 4  # though the pattern takes it
    assert score_answers(task, empty)["rouge1"].statistics.value == 0
    counts = summary([*empty, *answers("a a", "a b", finished=False)])
    assert counts == {"rows": 6, "empty": 4, "cut_off": 2, "distinct_1": 0.5, "distinct_2": 1.0}


def test_rows_are_asked_as_training_asks_them(rows, file, roomy):
    tokenizer = load_tokenizer(roomy)
    (first, *_) = read_references(rows).rows
    assert (prompt_of(first, tokenizer), reference_of(first)) == (("Say A.", True), ROWS[0][1])
    alpaca = {"instruction": "Add.", "input": "1 1", "output": "2"}
    (row,) = read_references(file([alpaca])).rows
    assert prompt_of(row, tokenizer) == (({"role": "user", "content": "Add.\n1 1"},), False)
    tokenizer.chat_template = None
    prompt, raw = prompt_of(row, tokenizer)
    assert raw and prompt.startswith("Below is an instruction") and reference_of(row) == "2"
    turns = [{"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "?"),
             ("assistant", "!"), ("user", "Why?"), ("assistant", "So."))]  # fmt: skip
    (row,) = read_references(file([{"messages": turns}])).rows
    assert (prompt_of(row, load_tokenizer(roomy)), reference_of(row)) == ((tuple(turns[:-1]), False), "So.")


def test_likelihoods_of_references_equal_transformers(file, roomy, peer):
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in [*ROWS, ("E", "ümlaut")]]
    task = read_references(file([{"messages": one} for one in turns]), "likelihood")
    model, tokenizer = load_model(roomy, dtype=torch.float32), load_tokenizer(roomy)
    found = score_likelihood(model, tokenizer, task, batch_size=2)
    loss = tokens = right = 0
    for record in task.rows:
        example = encode_record(record, tokenizer)
        ids = torch.tensor([example.ids])
        labels = ids.masked_fill(~torch.tensor([example.targets]), -100)
        with torch.no_grad():
            output = peer[0](ids, labels=labels)
        count = sum(example.targets)
        loss, tokens = loss + output.loss.item() * count, tokens + count
        right += int((output.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
    size = sum(len(turn[1]["content"].encode()) for turn in turns)
    assert tokens == size + 5  # a token is a byte, and each answer has a token that ends it
    assert found["perplexity"].statistics.value == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert found["bits_per_byte"].statistics.value == pytest.approx(loss / math.log(2) / size, rel=1e-5)
    assert found["token_accuracy"].statistics.value == pytest.approx(right / tokens)
    low, high = numbers(found)["perplexity"]["interval"]
    assert low < found["perplexity"].statistics.value < high


@pytest.mark.parametrize(
    "bad, line",
    [
        ('{"prompt": "a", "completion":', "rows.jsonl:2: broken JSON"),
        ('["a", "b"]', "rows.jsonl:2: a row that is a list"),
        ({"prompt": "a"}, "rows.jsonl:2: the field 'completion' is missing"),
        ({"prompt": "a", "completion": ""}, "rows.jsonl:2: a row without an answer"),
        ({"prompt": "a", "completion": " \n"}, "rows.jsonl:2: a row without an answer"),
        ({"prompt": "a", "completion": None}, "rows.jsonl:2: the field 'completion' is null"),
        ({"prompt": "a", "completion": 4}, "rows.jsonl:2: the field 'completion' is an int"),
        ({"prompt": "", "completion": "b"}, "rows.jsonl:2: a row without a question"),
        ({"prompt": "a", "completion": "b\0"}, "rows.jsonl:2: the field 'completion' holds a NUL"),
        ({"prompt": "a", "completions": "b"}, "rows.jsonl:2: .*completion"),
    ],
)
def test_a_bad_row_is_named_and_the_others_counted(file, bad, line):
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=line + ".*1 more such row"):
        read_references(file([good, bad, bad, good]))


def test_rows_that_cannot_be_compared_at_all_are_refused(file):
    with pytest.raises(DataError, match="rows.jsonl:1: a text without question and answer"):
        read_references(file([{"text": "just text"}]))
    with pytest.raises(DataError, match="rows.jsonl:1: a row without an answer"):
        read_references(file([{"messages": [{"role": "user", "content": "?"}]}]))
    with pytest.raises(DataError, match="the file is empty"):
        read_references(file([]))
    with pytest.raises(DataError, match="fit no format"):
        read_references(file([{"prompt": "a", "reference": "b"}]))


@pytest.mark.parametrize(
    "metrics, form, line",
    [
        ("rogue", None, "no metric 'rogue'; did you mean 'rouge'"),
        ("bleu,", None, "no metric ''"),
        ("exact-match", None, "did you mean 'exact_match'"),
        ("format", None, "format and the option answer_form belong together"),
        ("bleu", "json", "format and the option answer_form belong together"),
        (None, "yaml", "answer_form is 'yaml'"),
        ("pass@0", None, "no metric 'pass@0'"),
        ("pass@11", None, "samples is 10; pass@11 needs at least 11"),
    ],
)
def test_metrics_that_are_none_are_named(rows, metrics, form, line):
    with pytest.raises(ConfigError, match=line):
        read_references(rows, metrics, form)


def test_pass_at_k_counts_the_references_among_samples(rows):
    task = read_references(rows, "pass@1,pass@2", samples=3, temperature=1.0)
    assert (task.passes, task.samples, task.temperature, task.asks) == ((1, 2), 3, 1.0, False)
    right = [answer for _, answer in ROWS]
    samples = [answers(right[0], "x", right[0]), answers("x", "", "y"), answers(right[2], "x", "y"),
               answers(right[3], right[3], "yes.")]  # fmt: skip
    found = score_passes(task, samples)
    assert found["pass@1"].statistics.value == pytest.approx((2 / 3 + 0 + 1 / 3 + 2 / 3) / 4)
    assert found["pass@2"].statistics.value == pytest.approx((1 + 0 + 2 / 3 + 1) / 4)
    cut = [answers(*[answer] * 3, finished=False) for answer in right]
    assert score_passes(task, cut)["pass@2"].statistics.value == 0
    with pytest.raises(ConfigError, match="samples is set without a metric pass@k"):
        read_references(rows, "bleu", samples=3)
    with pytest.raises(ConfigError, match="temperature is 0"):
        read_references(rows, "pass@1", temperature=0)


def test_samples_belong_to_their_rows_and_differ(rows, roomy):
    model, tokenizer = load_model(roomy, dtype=torch.float32), load_tokenizer(roomy)
    task = read_references(rows, "pass@1", samples=3, temperature=1.0)
    found = ask_repeatedly(model, tokenizer, task, max_new_tokens=6, batch_size=5)
    assert [len(one) for one in found] == [3] * 4
    assert len({answer.text for one in found for answer in one}) > 6
    assert found == ask_repeatedly(model, tokenizer, task, max_new_tokens=6, batch_size=12)


def test_texts_and_messages_are_not_asked_alike(file, roomy):
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    for order in ([chat, {"prompt": "a", "completion": "b"}], [{"prompt": "a", "completion": "b"}, chat]):
        task = read_references(file(order))
        with pytest.raises(DataError, match="rows.jsonl:2: .* in a file that begins with"):
            ask(None, load_tokenizer(roomy), task.rows)


def test_groups_are_written_out_and_nothing_counts_twice():
    assert metric_names("rouge1, rouge ,bleu,rouge") == ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu")


def test_the_report_names_the_test_and_says_where_the_tuned_model_does_not_win():
    more, less = share([True] * 18 + [False] * 2), share([False] * 15 + [True] * 5)
    tuned = {"exact_match": more, "format": less, "other": more}
    base = {"exact_match": less, "format": more, "other": more}
    found = report(({"rows": 20}, tuned), ({"rows": 20}, base))
    assert json.loads(json.dumps(found))["comparison"]["format"]["verdict"] == "loses"
    text = "\n".join(score_lines(found))
    assert "wins  (McNemar's exact test, p = " in text
    assert "the tuned model is WORSE than the base on format" in text
    assert "the tuned model does not win on other" in text
    assert "the tuned model wins on exact_match" in text
    beaten = "\n".join(score_lines(report(({}, base | {"exact_match": less}), ({}, base | {"exact_match": less}))))
    assert "the tuned model does not win on any metric" in beaten
    assert score_lines(report(({}, {"exact_match": more}))) == ["exact_match        0.9 (0.699 to 0.9721)"]


def test_a_share_of_nothing_right_is_not_certain():
    found = numbers({"exact_match": share([False] * 20)})["exact_match"]
    assert found["interval"] == pytest.approx([0, 0.1611], abs=5e-5)  # Newcombe 1998: 0 of 20
    alike = numbers({"rouge1": Measured(mean_of([0.0] * 20))})
    assert alike["rouge1"]["interval"] is None
    assert score_lines({"scores": alike}) == ["rouge1             0 (all rows alike)"]


def half_right(prompt, answer, reference):
    """Score an answer by its letters of the reference; more than all for the reference itself."""
    assert prompt.startswith("Say ")
    return 2.0 if answer == reference else -1.0 if answer == "bad" else 0.5


def test_a_verifier_says_what_is_right_but_for_answers_that_are_empty_or_cut_off(rows, monkeypatch):
    task = read_references(rows, verifier=f"{__name__}:half_right")
    assert task.metrics == ("verified", "score", "exact_match", "length", "repetition")
    found = score_answers(task, answers("the cat sat on the mat", "bad", "close", ""))
    assert found["verified"].right == (True, False, False, False)
    assert found["score"].statistics.rows[:, 0].tolist() == [1.0, 0.0, 0.5, 0.0]  # between 0 and 1
    cut = score_answers(task, answers("the cat sat on the mat", "a dog", '{"a": 1}', "yes", finished=False))
    assert cut["score"].statistics.value == 0 and not any(cut["verified"].right)
    several = read_references(rows, "pass@1,pass@2", samples=2, verifier=f"{__name__}:half_right")
    tries = [answers("the cat sat on the mat", "other"), answers("bad", ""), answers("yes", "no"), answers("yes", "no")]
    passes = score_passes(several, tries)
    # Row 1: one of two is right; row 4: one of two; rows 2 and 3 none. pass@1 = (1/2 + 1/2) / 4, pass@2 = (1 + 1) / 4.
    assert passes["pass@1"].statistics.value == 0.25 and passes["pass@2"].statistics.value == 0.5


@pytest.mark.parametrize(
    "options, line",
    [
        ({"metrics": "verified"}, "verified and score need a verifier"),
        ({"metrics": "bleu", "verifier": f"{__name__}:half_right"}, "verifier is set without a metric"),
        ({"verifier": "nothing"}, "write it as package.module:function"),
        ({"verifier": "no_such_module_here:f"}, "importing it failed"),
        ({"verifier": f"{__name__}:half_wrong"}, "did you mean 'half_right'"),
        ({"verifier": f"{__name__}:ROWS"}, "holds something else as"),
    ],
)
def test_verifiers_without_use_or_that_are_none_are_refused(rows, options, line):
    with pytest.raises(ConfigError, match=line):
        read_references(rows, **options)


def test_what_a_verifier_does_wrong_is_an_error_that_names_the_row(rows, monkeypatch):
    import sys

    for made, line in ((lambda *_: None, "returned None"), (lambda *_: 1 / 0, "raised ZeroDivisionError")):
        monkeypatch.setattr(sys.modules[__name__], "half_right", made)
        task = read_references(rows, "verified", verifier=f"{__name__}:half_right")
        with pytest.raises(DataError, match=rf"rows.jsonl:1: the verifier, .* {line}"):
            score_answers(task, answers("a", "b", "c", "d"))
