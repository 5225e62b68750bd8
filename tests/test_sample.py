"""Sampling preferences end to end on tiny models: rows, counts, seeds, scorers, and what is refused."""

import json
import math
import shutil

import pytest
import torch

from minitune import load_model, load_tokenizer, sample, score
from minitune.checkpoint.huggingface import save_model
from minitune.data.formats import read_records
from minitune.data.pairing import survey_preferences
from minitune.data.preference_formats import FORMATS_OF
from minitune.decoding import generate_ids
from minitune.errors import CheckpointError, ConfigError, DataError
from minitune.sample import Asked, Completion, SampleConfig
from minitune.sampling import Sampling

VERIFIERS = """
import math
table = [1, 2]
def length(prompt, completion): return len(completion)
def turns(prompt, completion): return prompt[-1]["content"] == "Hi"
def broken(prompt, completion): return 1 // 0
def nan(prompt, completion): return math.nan
def nothing(prompt, completion): pass
def word(prompt, completion): return "good"
def stopped(prompt, completion): raise KeyboardInterrupt
"""
PROMPTS = [{"prompt": "Hi"}, {"prompt": "What is the time now?"}, {"prompt": "Name a fish"}]


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory) -> str:
    """A model with room for a judge's prompt, whose answers differ, and end at about one token in eight."""
    folder = tiny_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=1024, tie_word_embeddings=False)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with torch.no_grad():
        usual = model.hidden(torch.arange(256)[None])[0].mean(0)
        model.lm_head.weight.mul_(0.2)
        model.lm_head.weight[tokenizer.eos_id] = usual / (usual @ usual) * 3.6  # of 260 tokens: e^3.6 / 296 = 0.12
    save_model(model, tokenizer, folder, overwrite=True)
    return str(folder)


@pytest.fixture(scope="module")
def rewarding(tiny, save_reward_adapter, tmp_path_factory) -> str:
    return save_reward_adapter(tiny, tmp_path_factory.mktemp("reward"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with prompts and a module of verifiers, to be in."""
    (tmp_path / "verifiers.py").write_text(VERIFIERS)
    (tmp_path / "raising.py").write_text("raise OSError('no licence')")
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(tiny: str, *options: str) -> None:
    scorer = () if {"--verifier", "--reward", "--judge"} & set(options) else ("--verifier", "verifiers:length")
    sample.main(
        ["--model", tiny, "--prompts", "prompts.jsonl", "--output", "out.jsonl", "--dtype", "float32"]
        + ["--max_new_tokens", "24", "--unfinished", "reject", *scorer, *options]
    )


def rows(name: str = "out.jsonl") -> list[dict]:
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def is_text(row: dict) -> bool:
    text = row["completion"][0]["content"]
    return bool(text.strip()) and "\0" not in text


def test_the_rows_are_the_best_and_the_worst_of_what_was_sampled(tiny, place, capsys):
    run(tiny, "--output_all", "all.jsonl", "--completions", "6", "--seed", "3", "--top_k", "200")
    everything, pairs = rows("all.jsonl"), rows()
    assert len(everything) == 18
    tokenizer, model = load_tokenizer(tiny), load_model(tiny)
    turns = [[{"role": "user", "content": row["prompt"]}] for row in PROMPTS]
    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n", control=True)
        for row in PROMPTS
    ]
    ids = generate_ids(  # the same draws, all in one batch
        model, [prompt for prompt in prompts for _ in range(6)], max_new_tokens=24, end_ids=tokenizer.end_ids,
        sampling=Sampling(temperature=1.0, top_k=200), seed=3,
    )  # fmt: skip
    assert [row["completion"][0]["content"] for row in everything] == [tokenizer.decode(one) for one in ids]
    assert [row["tokens"] for row in everything] == [len(one) for one in ids]
    assert all(row["finished"] == (row["tokens"] < 24) for row in everything)
    assert all(row["score"] == len(row["completion"][0]["content"]) for row in everything)
    for number, prompt in enumerate(turns):
        own = [row for row in everything if row["prompt"] == prompt and is_text(row)]
        best = max((row["score"] for row in own if row["finished"]), default=-math.inf)
        worst = min(row["score"] for row in own)
        written = [row for row in pairs if row["prompt"] == prompt]
        assert len(written) == (best > worst)
        for row in written:
            assert (row["score_chosen"], row["score_rejected"]) == (best, worst)
            assert len(row["chosen"][0]["content"]) == best and len(row["rejected"][0]["content"]) == worst
            assert row["source"] == f"prompts.jsonl:{number + 1}"
    assert pairs
    average = sum(row["score"] for row in everything) / 18
    printed = capsys.readouterr().out
    assert f"mean {average:.4g} (95% interval" in printed and f"{len(pairs)} row" in printed


def test_training_reads_the_pairs(tiny, place):
    run(tiny, "--completions", "6")
    records = read_records("out.jsonl", formats=FORMATS_OF["pairs"])
    survey = survey_preferences(records, load_tokenizer(tiny), max_length=512, truncate="error", train_on="all")
    assert survey.problem() is None and len(survey.examples) == len(rows())
    assert [pair.margin for pair in survey.examples] == [row["score_chosen"] - row["score_rejected"] for row in rows()]


def test_judged_rows_are_what_kto_reads(tiny, place, capsys):
    run(tiny, "--format", "judged", "--threshold", "9", "--output_all", "all.jsonl")
    records = read_records("out.jsonl", formats=FORMATS_OF["judged"])
    assert len(records) == len(rows()) > 0
    for row in rows():
        finished = any(
            other["finished"] and (other["prompt"], other["completion"]) == (row["prompt"], row["completion"])
            for other in rows("all.jsonl")
        )
        assert row["label"] == (row["score"] >= 9 and finished)
    good = sum(row["label"] for row in rows())
    assert f"{good} are good, {len(rows()) - good} bad" in capsys.readouterr().out


def test_batches_do_not_change_what_is_sampled(tiny, place):
    run(tiny, "--output_all", "one.jsonl", "--batch_size", "1", "--overwrite")
    run(tiny, "--output_all", "five.jsonl", "--batch_size", "5", "--overwrite")
    assert rows("one.jsonl") == rows("five.jsonl")
    run(tiny, "--output_all", "other.jsonl", "--seed", "1", "--overwrite")
    assert rows("one.jsonl") != rows("other.jsonl")


def test_a_text_prompt_is_continued_where_training_does_so(tiny, place):
    (place / "prompts.jsonl").write_text(json.dumps({"prompt": "One and one is", "completion": " two"}))
    run(tiny, "--completions", "6")
    (row,) = rows()
    assert row["prompt"] == "One and one is" and isinstance(row["chosen"], str)
    (record,) = read_records("out.jsonl", formats=FORMATS_OF["pairs"])
    assert [side.completion for side in record.sides] == [row["chosen"], row["rejected"]]


def test_a_reward_model_scores(tiny, rewarding, place):
    from minitune.evaluation.reward import score as rewards

    run(tiny, "--reward", tiny, "--reward_adapter", rewarding, "--output_all", "all.jsonl")
    conversations = [row["prompt"] + row["completion"] for row in rows("all.jsonl")]
    expected = rewards(load_model(tiny, adapter=rewarding), load_tokenizer(tiny), conversations, batch_size=1)
    assert [row["score"] for row in rows("all.jsonl")] == pytest.approx(expected, abs=1e-5)
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows())


def test_a_judge_scores_by_its_rubric(tiny, place):
    from minitune.evaluation.judge import rank

    (place / "rubric.txt").write_text("The shorter one.\n")
    (place / "prompts.jsonl").write_text(json.dumps(PROMPTS[0]))
    try:
        run(tiny, "--judge", tiny, "--rubric", "rubric.txt", "--output_all", "all.jsonl")
    except DataError as error:  # a random judge may find all alike; what it found is written nonetheless
        assert "no row is left" in str(error)
    answers = [row["completion"][0]["content"] for row in rows("all.jsonl")]
    different = list(dict.fromkeys(answers))
    turns = [{"role": "user", "content": "Hi"}]
    (expected,) = rank(load_model(tiny), load_tokenizer(tiny), [turns], [different], rubric="The shorter one.")
    assert [row["score"] for row in rows("all.jsonl")] == [expected[different.index(text)] for text in answers]


def asked(number: int = 1) -> Asked:
    return Asked([{"role": "user", "content": f"prompt {number}"}], [1], f"file:{number}")


def config(**options) -> SampleConfig:
    return SampleConfig(prompts="p.jsonl", output="o.jsonl", verifier="v:f", **options)


def test_what_is_left_out_is_counted_by_hand():
    end, cut = True, False
    completions = [
        [Completion("a", 1, end, 1.0), Completion(" a\n", 2, end, 1.0), Completion("b", 1, end, 0.5)],  # a duplicate
        [  # a near-tie, an empty one, one that no file of rows may hold
            Completion("a", 1, end, 1.0),
            Completion("b", 1, end, 0.95),
            Completion(" ", 1, end, 0.0),
            Completion("\0", 1, end, 0.0),
        ],
        [Completion("best", 4, cut, 9.0), Completion("a", 1, end, 1.0), Completion("b", 1, end, 2.0)],
        [Completion("a", 1, end, 1.0), Completion("a", 1, end, 1.0), Completion("worst", 9, cut, 0.0)],  # one is left
    ]
    prompts = [asked(n) for n in range(1, 5)]
    found, words = sample.choose(prompts, completions, config(min_margin=0.1))
    texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["source"]) for row in found]
    assert texts == [("a", "b", "file:1"), ("b", "a", "file:3")]
    assert "2 cut off at max_new_tokens 256, 2 empty or with a NUL, 2 equal to another" in words
    assert "1 with too few others (two must have ended), 1 without a margin above 0.1" in words
    found, words = sample.choose(prompts, completions, config(min_margin=0.1, unfinished="reject"))
    texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found]
    assert texts == [("a", "b"), ("b", "a"), ("a", "worst")]  # "best" was cut off: it is never the chosen one
    found, words = sample.choose(prompts, completions, config(format="judged", threshold=1.0, unfinished="reject"))
    labels = [(row["completion"][0]["content"], row["label"]) for row in found]
    assert labels == [
        ("a", True), ("b", False), ("a", True), ("b", False), ("a", True), ("b", True), ("best", False), ("a", True),
        ("worst", False),
    ]  # fmt: skip
    assert "of the others 5 are good, 4 bad" in words


def test_of_equal_completions_one_that_ended_stays():
    answers = [Completion("a", 9, False, 0.0), Completion("a", 1, True, 0.0)]
    assert sample.candidates(answers, "reject", {"duplicate": 0}) == [answers[1]]


def test_the_interval_is_that_of_the_prompts_means():
    # means 1/2 and 1: 3/4 +- 1.95996 sqrt(1/8) / sqrt(2) = 3/4 +- 0.48999
    assert sample.score_line([[0, 1], [1, 1]]) == "mean 0.75 (95% interval 0.26 to 1.24) of 4 completions of 2 prompts"
    assert sample.score_line([[0, 1]]) == "mean 0.5 of 2 completions of 1 prompt"


@pytest.mark.parametrize(
    "options, line",
    [
        (("--completions", "1"), "completions is 1; a pair needs at least 2"),
        (("--temperature", "0"), "temperature is 0 .greedy., so all completions of a prompt would be equal"),
        (("--judge", "x", "--reward", "y"), "give one of --verifier, --reward and --judge; found reward and judge"),
        (("--reward_adapter", "x"), "reward_adapter is set without reward"),
        (("--rubric", "x"), "rubric is set without judge"),
        (("--min_margin", "-1"), "min_margin is -1.0; it must be 0 or more"),
        (("--min_margin", "1", "--format", "judged", "--threshold", "1"), "for format pairs alone"),
        (("--threshold", "1"), "threshold belongs to format judged"),
        (("--format", "judged"), "threshold belongs to format judged"),
        (("--format", "judged", "--threshold", ".nan"), "threshold is nan; it must be a finite number"),
        (("--max_new_tokens", "0"), "max_new_tokens is 0"),
        (("--output_all", "out.jsonl"), "must be different files"),
        (("--output", "prompts.jsonl", "--overwrite"), "must be different files"),
        (("--verifier", "length"), "verifier is 'length'; write it as package.module:function"),
        (("--verifier", "nowhere:f"), "verifier nowhere:f: importing it failed .ModuleNotFoundError"),
        (("--verifier", "raising:f"), "verifier raising:f: importing it failed .OSError: no licence"),
        (("--verifier", "verifiers:lenght"), "verifiers has no function 'lenght'; did you mean 'length'"),
        (("--verifier", "verifiers:table"), "holds something else as function 'table'"),
    ],
)
def test_options_without_meaning_are_refused(tiny, place, options, line):
    with pytest.raises(ConfigError, match=line):
        run(tiny, *options)
    assert not (place / "out.jsonl").exists()


def test_no_scorer_is_refused(tiny, place):
    with pytest.raises(ConfigError, match="found none of them"):
        sample.main(["--model", tiny, "--prompts", "prompts.jsonl", "--output", "out.jsonl"])


@pytest.mark.parametrize(
    "verifier, line",
    [
        ("broken", r"prompts.jsonl:1: the verifier, given the completion .* raised ZeroDivisionError"),
        ("nan", r"prompts.jsonl:1: .* returned nan; it must return a finite number or a bool"),
        ("nothing", r"prompts.jsonl:1: .* returned None"),
        ("word", r"prompts.jsonl:1: .* returned 'good'"),
    ],
)
def test_a_verifier_that_fails_is_named_with_the_row(tiny, place, verifier, line):
    with pytest.raises(DataError, match=line):
        run(tiny, "--verifier", f"verifiers:{verifier}")
    assert {path.name for path in place.iterdir()} <= {"verifiers.py", "raising.py", "prompts.jsonl", "__pycache__"}


def test_a_verifier_sees_messages_and_may_return_a_bool(tiny, place):
    with pytest.raises(DataError, match="no row is left for out.jsonl; .* 3 without a margin above 0|too few others"):
        run(tiny, "--verifier", "verifiers:turns", "--output_all", "all.jsonl")
    assert {(row["prompt"][0]["content"], row["score"]) for row in rows("all.jsonl")} == {
        ("Hi", 1.0), ("What is the time now?", 0.0), ("Name a fish", 0.0),
    }  # fmt: skip
    assert not (place / "out.jsonl").exists()


def test_models_of_the_other_kind_and_missing_files_are_refused(tiny, rewarding, place):
    with pytest.raises(ConfigError, match="a language model without a reward head"):
        run(tiny, "--reward", tiny)
    with pytest.raises(ConfigError, match="is a reward model"):
        run(tiny, "--adapter", rewarding)
    with pytest.raises(ConfigError, match="rubric nothing.txt cannot be read"):
        run(tiny, "--judge", tiny, "--rubric", "nothing.txt")
    (place / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="rubric empty.txt is empty"):
        run(tiny, "--judge", tiny, "--rubric", "empty.txt")
    with pytest.raises(CheckpointError, match="nowhere"):
        run(tiny, "--judge", "nowhere")
    with pytest.raises(DataError, match="nothing.jsonl: no such file"):
        run(tiny, "--prompts", "nothing.jsonl")
    with pytest.raises(
        DataError, match="prompts.jsonl:2: .* tokens and 1000 new ones, but the model reads at most 1024"
    ):
        run(tiny, "--max_new_tokens", "1000")


def test_chats_need_a_template(tiny, place):
    folder = shutil.copytree(tiny, place / "plain")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    run(str(folder))  # {"prompt": text} is continued
    assert isinstance(rows()[0]["prompt"], str)
    (place / "prompts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(DataError, match="prompts.jsonl:1: .* this tokenizer has no chat template"):
        run(str(folder), "--overwrite")


def test_what_is_there_is_kept_until_the_new_is_whole(tiny, place):
    (place / "out.jsonl").write_text("old")
    with pytest.raises(ConfigError, match="out.jsonl is there already; .*--overwrite"):
        run(tiny)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, "--overwrite", "--verifier", "verifiers:stopped")
    assert (place / "out.jsonl").read_text() == "old"
    assert not [path for path in place.iterdir() if path.name.startswith(".out")]
    run(tiny, "--overwrite")
    assert rows()[0]["chosen"]


def test_score_prints_how_often_the_chosen_side_is_above(tiny, rewarding, place, capsys):
    run(tiny, "--reward", tiny, "--reward_adapter", rewarding)
    pairs = rows()
    swapped = pairs[0] | {"chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]}
    for row in (*pairs, swapped):
        del row["score_chosen"], row["score_rejected"]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*pairs, swapped])))
    capsys.readouterr()
    score.main(["--model", tiny, "--adapter", rewarding, "--data", "pairs.jsonl", "--output", "r.jsonl",
                "--dtype", "float32"])  # fmt: skip
    printed = capsys.readouterr().out
    assert f"chosen above rejected in {len(pairs)} of {len(pairs) + 1} pairs" in printed
    written = rows("r.jsonl")
    assert written[-1]["reward_chosen"] == pytest.approx(written[0]["reward_rejected"], abs=1e-5)
    assert [row["source"] for row in written] == [f"pairs.jsonl:{n + 1}" for n in range(len(written))]
    (place / "rows.jsonl").write_text(json.dumps({"messages": pairs[0]["prompt"] + pairs[0]["chosen"]}))
    score.main(["--model", tiny, "--adapter", rewarding, "--data", "rows.jsonl", "--dtype", "float32"])
    assert f"mean {written[0]['reward_chosen']:.4g} of 1 answer" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="a language model without a reward head"):
        score.main(["--model", tiny, "--data", "rows.jsonl"])


def test_accuracy_and_margin_by_hand():
    # margins 1, -1, 0, 2: 2 of 4 right (equal is wrong); Wilson's interval of 2 in 4 is 0.5 +- 0.35
    printed = score.summary([[2.0, 1.0], [0.0, 1.0], [3.0, 3.0], [5.0, 3.0]])
    assert printed == (
        "accuracy  50.0%  (95% interval 15.0% to 85.0%; chosen above rejected in 2 of 4 pairs)\nmargin    mean 0.5"
    )


def test_a_trained_reward_model_is_scored_and_scores(tiny, place, capsys):
    from minitune import train

    pairs = [
        {"prompt": f"Say {word}", "chosen": f"{word} it is!", "rejected": f"no {word} today"}
        for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")
    ]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    train.main(
        ["--config", "reward", "--model", tiny, "--data", "pairs.jsonl", "--output", "run", "--dtype", "float32"]
        + ["--validation_fraction", "0", "--max_steps", "20", "--accumulation_steps", "1", "--max_length", "128"]
        + ["--optimizer.learning_rate", "0.01"]
    )
    scoring = ["--model", tiny, "--adapter", "run/adapter", "--data", "pairs.jsonl", "--dtype", "float32"]
    capsys.readouterr()
    score.main(scoring)
    assert "chosen above rejected in 8 of 8 pairs" in capsys.readouterr().out
    run(tiny, "--reward", tiny, "--reward_adapter", "run/adapter")
    assert rows()
