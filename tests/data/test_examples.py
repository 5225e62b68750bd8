"""What of a row is learned, against transformers' own masks, and what becomes of rows that are too long."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data.examples import build_examples, encode_record, percentiles
from minitune.data.formats import Record
from minitune.errors import CheckpointError, ConfigError, DataError

EOS = 258
TURNS = [("system", "S"), ("user", "Hi é"), ("assistant", "one"), ("user", "more?"), ("assistant", "two")]


def chat(turns=TURNS, context=0, origin="a.jsonl:1"):
    """Return a chat record."""
    return Record(origin, "messages", tuple({"role": r, "content": c} for r, c in turns), context=context)


def pair(prompt="2+2=", completion=" 4", origin="a.jsonl:1"):
    """Return a prompt/completion record."""
    return Record(origin, "prompt_completion", prompt=prompt, completion=completion)


def build(record, tokenizer, **options):
    return build_examples([record], tokenizer, **{"max_length": 1000} | options)


def learned_text(example, tokenizer):
    """Return the text of the targets."""
    ids = [i for i, target in zip(example.ids, example.targets, strict=True) if target]
    return tokenizer.decode(ids, skip_special=False)


def full_text(example, tokenizer):
    return tokenizer.decode(example.ids, skip_special=False)


def test_chat_ids_and_targets_are_those_of_transformers(tokenizers, judge):
    (example,) = build(chat(), tokenizers["chat"])
    expected = judge.apply_chat_template(list(chat().messages), return_dict=True, return_assistant_tokens_mask=True)
    assert list(example.ids) == expected["input_ids"]
    assert [int(target) for target in example.targets] == expected["assistant_masks"]
    assert learned_text(example, tokenizers["chat"]) == "one<|im_end|>two<|im_end|>"


def test_only_the_last_answer_or_that_of_the_completion(tokenizers):
    for record, train_on in ((chat(), "last"), (chat(context=4), "all"), (chat(context=4), "last")):
        (example,) = build(record, tokenizers["chat"], train_on=train_on)
        assert learned_text(example, tokenizers["chat"]) == "two<|im_end|>"
        assert example.ids == build(chat(), tokenizers["chat"])[0].ids
    longer = [*TURNS, ("user", "and?"), ("assistant", "three")]
    (example,) = build(chat(longer, context=4), tokenizers["chat"])
    assert learned_text(example, tokenizers["chat"]) == "two<|im_end|>three<|im_end|>"


def test_a_prompts_own_answers_need_not_be_trainable(with_template):
    """Templates of reasoning models shorten earlier answers; only as targets are these refused."""
    forgetful = with_template("", "{{ m.content }}<|im_end|>", "{{ m.content if loop.last else '' }}<|im_end|>")
    with pytest.raises(DataError, match="writes this answer differently once later turns follow"):
        build(chat(), forgetful)
    (example,) = build(chat(context=4), forgetful)
    assert learned_text(example, forgetful) == "two<|im_end|>"


def test_prompt_and_completion_are_encoded_apart(tokenizers, judge):
    (example,) = build(pair(), tokenizers["plain"])
    prompt, answer = judge("2+2=")["input_ids"], judge(" 4")["input_ids"] + [EOS]
    assert list(example.ids) == prompt + answer
    assert list(example.targets) == [False] * len(prompt) + [True] * len(answer)


def test_every_token_of_a_text_is_learned_but_the_first(tokenizers, judge):
    for name, bos in (("plain", []), ("bos", [256])):
        (example,) = build(Record("a:1", "text", text="ab"), tokenizers[name])
        assert list(example.ids) == bos + judge("ab")["input_ids"] + [EOS]
        assert list(example.targets) == [False] + [True] * (len(example.ids) - 1)
        assert example.ids.count(256) == len(bos)


def test_alpaca_needs_no_chat_template(tokenizers):
    record = Record("a:1", "alpaca", chat().messages, prompt="### Response:", completion="yes")
    assert full_text(build(record, tokenizers["plain"])[0], tokenizers["plain"]) == "### Response:yes<|im_end|>"
    assert learned_text(build(record, tokenizers["chat"])[0], tokenizers["chat"]).startswith("one")
    with pytest.raises(DataError, match="a.jsonl:1: a chat, but the tokenizer has no chat template"):
        build(chat(), tokenizers["plain"])


def test_control_tokens_in_rows_stay_text(tokenizers):
    text = "<|im_end|><s>"
    for record in (pair(prompt=text, completion=text), Record("a:1", "text", text=text)):
        (example,) = build(record, tokenizers["plain"])
        assert [i for i in example.ids if i > 255] == [EOS]


def test_ids_are_shared_objects(tokenizers):
    one, two = build_examples([pair("Ā"), pair("Ā")], tokenizers["plain"], max_length=50)
    assert all(a is b for a, b in zip(one.ids, two.ids, strict=True))


def rows_of(*lengths):
    """Return text rows of these lengths in tokens, EOS included."""
    return [Record(f"a.jsonl:{n}", "text", text="x" * (length - 1)) for n, length in enumerate(lengths, 1)]


def test_over_long_rows_are_an_error_with_count_percentiles_and_origins(tokenizers):
    lengths = [*range(2, 100), 300, 200]
    with pytest.raises(DataError) as caught:
        build_examples(rows_of(*lengths), tokenizers["plain"], max_length=98)
    ranks = [int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 90, 99, 100)]
    assert str(caught.value).startswith(
        "3 of 100 rows are over max_length 98 "
        f"(tokens: 50% {ranks[0]}, 90% {ranks[1]}, 99% {ranks[2]}, 100% {ranks[3]}); "
        "first: a.jsonl:98 (99), a.jsonl:99 (300), a.jsonl:100 (200); "
    )
    with pytest.raises(DataError, match="all 2 rows are over max_length 5"):
        build_examples(rows_of(6, 7), tokenizers["plain"], max_length=5)
    assert len(build_examples(rows_of(98), tokenizers["plain"], max_length=98)) == 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200))
def test_percentiles_are_numpys_nearest_rank(lengths):
    for share, value in percentiles(lengths).items():
        assert value == np.percentile(lengths, share, method="inverted_cdf")


def test_over_long_rows_dropped_on_request(tokenizers):
    examples = build_examples(rows_of(5, 50, 6), tokenizers["plain"], max_length=10, truncate="drop")
    assert [example.origin for example in examples] == ["a.jsonl:1", "a.jsonl:3"]
    with pytest.raises(DataError, match="all 2 rows are over max_length 10.*no row is left"):
        build_examples(rows_of(50, 60), tokenizers["plain"], max_length=10, truncate="drop")


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 60), limit=st.integers(2, 20), document=st.booleans())
def test_windows_learn_every_token_once_in_its_context(tokenizers, length, limit, document):
    text = "".join(chr(97 + i % 26) for i in range(length - 1))
    record = Record("a.txt:1", "text", text=text, document=document)
    whole = encode_record(record, tokenizers["plain"])
    truncate = "error" if document else "split"
    windows = build(record, tokenizers["plain"], max_length=limit, truncate=truncate)
    assert all(2 <= len(window.ids) <= limit and not window.targets[0] for window in windows)
    learned = [i for w in windows for i, target in zip(w.ids, w.targets, strict=True) if target]
    assert learned == list(whole.ids[1:])
    for one, following in zip(windows, windows[1:], strict=False):
        assert following.ids[0] == one.ids[-1]


def test_split_leaves_chats_alone(tokenizers):
    with pytest.raises(DataError, match="1 of 1 row is over max_length 8.*only texts are split"):
        build(chat(), tokenizers["chat"], max_length=8, truncate="split")
    with pytest.raises(DataError, match="1 of 1 row is over max_length 3"):
        build(Record("a:1", "text", text="long"), tokenizers["plain"], max_length=3, truncate="prompt")


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["plain", "bos"]),
    prompt=st.integers(1, 30),
    answer=st.integers(1, 30),
    limit=st.integers(2, 40),
)
def test_a_cut_prompt_keeps_bos_its_end_and_the_whole_answer(tokenizers, name, prompt, answer, limit):
    record = pair("".join(chr(97 + i % 26) for i in range(prompt)), "z" * answer)
    whole = encode_record(record, tokenizers[name])
    if answer + 1 + 1 > limit and len(whole.ids) > limit:  # the answer, its EOS and one token before them
        with pytest.raises(DataError, match="answers alone do not fit"):
            build(record, tokenizers[name], max_length=limit, truncate="prompt")
        return
    (cut,) = build(record, tokenizers[name], max_length=limit, truncate="prompt")
    assert len(cut.ids) == min(limit, len(whole.ids))
    assert sum(cut.targets) == answer + 1
    head = int(name == "bos")
    assert cut.ids[:head] == whole.ids[:head]
    assert cut.ids[head:] == whole.ids[len(whole.ids) - len(cut.ids) + head :]
    assert cut.targets == tuple(i >= len(cut.ids) - answer - 1 for i in range(len(cut.ids)))


def cut_chat(tokenizer, limit, turns=TURNS, **options):
    (example,) = build(chat(turns), tokenizer, max_length=limit, truncate="prompt", **options)
    assert len(example.ids) <= limit
    return full_text(example, tokenizer)


def test_a_cut_chat_loses_the_beginning_of_its_question(tokenizers):
    tokenizer = tokenizers["chat"]
    turns = [("system", "S"), ("user", "0123456789"), ("assistant", "one")]
    whole = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
    length = len(build(chat(turns), tokenizer)[0].ids)
    for lost in range(10):
        assert cut_chat(tokenizer, length - lost, turns) == whole.format("0123456789"[lost:])
    with pytest.raises(DataError, match="answers alone do not fit"):
        cut_chat(tokenizer, length - 10, turns)


def test_a_cut_chat_loses_oldest_exchanges_before_the_first_target(tokenizers):
    tokenizer = tokenizers["chat"]
    turns = [TURNS[0], ("user", "a" * 9), ("assistant", "b" * 9), *TURNS[1:]]
    length = len(build(chat(turns), tokenizer)[0].ids)
    without_first = full_text(build(chat(TURNS), tokenizer)[0], tokenizer)
    assert cut_chat(tokenizer, length - 1, turns, train_on="last") == without_first
    # When every answer is learned, none may go: only the first question can give way.
    assert "aaaaaaaa<|im_end|>" in cut_chat(tokenizer, length - 1, turns)
    assert "aaaaaaaaa<" not in cut_chat(tokenizer, length - 1, turns)
    example = build(chat(turns), tokenizer, max_length=length - 9 + 1, truncate="prompt")[0]
    assert learned_text(example, tokenizer) == "b" * 9 + "<|im_end|>one<|im_end|>two<|im_end|>"


def test_a_cut_inside_a_character_drops_the_whole_character(tokenizers):
    tokenizer = tokenizers["chat"]
    turns = [("user", "éééé"), ("assistant", "one")]
    length = len(build(chat(turns), tokenizer)[0].ids)
    assert "user\néé<" in cut_chat(tokenizer, length - 3, turns)


def test_options_are_checked(tokenizers):
    with pytest.raises(ConfigError, match="max_length 1"):
        build(pair(), tokenizers["plain"], max_length=1)
    with pytest.raises(ConfigError, match="truncate 'left'"):
        build(pair(), tokenizers["plain"], truncate="left")
    with pytest.raises(DataError, match="no row to train on"):
        build_examples([], tokenizers["plain"], max_length=8)


def test_what_the_template_refuses_names_the_row(with_template):
    strict = with_template("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    with pytest.raises(DataError, match=r"a.jsonl:7: .*: no system; correct the row \(1 more such row\)"):
        build_examples([chat(origin="a.jsonl:7"), chat()], strict, max_length=99)
    with pytest.raises(CheckpointError):  # at once: it is not the row's fault
        build_examples([chat(), chat()], with_template("{{ messages | nonsense }}"), max_length=99)


def test_records_are_read_encoded_and_batched_end_to_end(tmp_path, tokenizers):
    from minitune.data.batching import collate, plan_batches
    from minitune.data.formats import read_records

    rows = [{"messages": [{"role": r, "content": f"{c} {i}" * i} for r, c in TURNS]} for i in range(1, 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = build_examples(read_records(tmp_path / "a.jsonl"), tokenizers["chat"], max_length=400)
    lengths = [len(example.ids) for example in examples]
    plan = plan_batches(lengths, batch_size=2, max_length=400, packing=True, seed=0, epoch=0)
    batches = [collate([[examples[i] for i in row] for row in batch], EOS) for batch in plan]
    assert sum(batch.target_count for batch in batches) == sum(sum(example.targets) for example in examples)
    assert sum(batch.document_count for batch in batches) == 8
    # each of the 16 answers ends with a learned end of turn, though padding has the same id
    assert sum(int((batch.targets == EOS).sum()) for batch in batches) == 16
