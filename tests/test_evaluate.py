"""The evaluate command on a tiny random model, against the libraries it calls and against transformers."""

import json
import math

import pytest
import torch

from minitune import evaluate
from minitune.decoding import Answer
from minitune.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [("good", "positive"), ("bad", "negative"), ("fine", "positive")]
    path.write_text("\n".join(json.dumps({"prompt": text, "completion": label}) for text, label in rows))
    return path


TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 3


def run(tiny: str, *options) -> None:
    evaluate.main(["--model", tiny, "--dtype", "float32", *map(str, options)])


def test_everything_measured_is_printed_and_written(tiny, reviews, tmp_path, capsys):
    text, output = tmp_path / "wiki.txt", tmp_path / "out.json"
    text.write_text(TEXT)
    run(tiny, "--classify", reviews, "--labels", "positive,negative", "--perplexity", text, "--output", output,
        "--max_new_tokens", 4, "--max_rows", 2, "--window", 200)  # fmt: skip
    result = json.loads(output.read_text())
    found = result["classification"]
    assert found["rows"] == 2
    assert found["confusion"] == [[0, 0, 1], [0, 0, 1]]  # a random model writes no label
    assert (found["accuracy"], found["format_compliance"]) == (0.0, 0.0)
    printed = capsys.readouterr().out
    assert "accuracy    0.0%" in printed and "other answers: " in printed
    assert f"perplexity  {result['perplexity']['perplexity']:.3f}" in printed


def test_perplexity_equals_transformers(tiny, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, output = tmp_path / "wiki.txt", tmp_path / "out.json"
    text.write_text(TEXT)
    run(tiny, "--perplexity", text, "--output", output, "--max_tokens", 150)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tiny)(TEXT)["input_ids"][:150]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny)(ids, labels=ids).loss.item()
    result = json.loads(output.read_text())
    assert result["perplexity"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert result["perplexity"]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert result["perplexity"]["tokens"] == 149
    assert "classification" not in result


@pytest.mark.parametrize(
    "options, line",
    [
        ((), "nothing to measure"),
        (("--classify", "x.jsonl"), "labels are missing"),
        (("--classify", "x.jsonl", "--labels", "a"), "at least two different ones"),
        (("--perplexity", "x.txt", "--labels", "a,b"), "labels is set without classify"),
        (("--classify", "x.jsonl", "--labels", "a,b", "--window", "4"), "window is set without perplexity"),
        (("--perplexity", "x.txt", "--batch_size", "4"), "batch_size is set without classify or references or choices"),
        (("--perplexity", "x.txt", "--metrics", "bleu"), "metrics is set without references"),
        (("--choices", "x.jsonl", "--answer_form", "json"), "answer_form is set without references"),
        (("--choices", "x.jsonl", "--max_new_tokens", "9"), "max_new_tokens is set without classify or references"),
        (("--perplexity", "x.txt", "--base", "m"), "base is set without classify or references or choices"),
        (("--perplexity", "x.txt", "--also", "[m]"), "several need a name each"),
        (("--perplexity", "x.txt", "--also", "[a=m,a=n]"), "several need a name each"),
        (("--perplexity", "x.txt", "--output", "x.jsonl"), "x.jsonl is there already"),
        (("--choices", "x.jsonl", "--samples", "9"), "samples is set without references"),
        (("--references", "x.jsonl", "--metrics", "pass@5", "--samples", "4"), "pass@5 needs at least 5"),
        (("--references", "x.jsonl", "--metrics", "rogue"), "no metric 'rogue'; did you mean 'rouge'"),
        (("--classify", "x.jsonl", "--labels", "a,b", "--batch_size", "0"), "batch_size is 0"),
    ],
)
def test_options_without_meaning_are_refused(tiny, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(ConfigError, match=line):
        run(tiny, *options)


def test_data_that_cannot_be_measured_is_named(tiny, reviews, tmp_path):
    with pytest.raises(DataError, match=r"test.jsonl:1: the answer 'positive' is not one of the labels good, bad"):
        run(tiny, "--classify", reviews, "--labels", "good,bad")
    with pytest.raises(CheckpointError, match="nothing.jsonl: no such file"):
        run(tiny, "--classify", tmp_path / "nothing.jsonl", "--labels", "a,b")
    with pytest.raises(DataError, match="perplexity reads plain text"):
        run(tiny, "--perplexity", reviews)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(DataError, match="empty"):
        run(tiny, "--perplexity", empty)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure", None)  # calling it would fail
    with pytest.raises(CheckpointError, match="is a folder; a file was to be written there"):
        run(tiny, "--perplexity", tmp_path / "a.txt", "--output", tmp_path)


def test_a_tokenizer_with_more_ids_than_the_model_has_is_refused(tiny_folder, tmp_path):
    small = tiny_folder(tmp_path / "model", vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    (tmp_path / "a.txt").write_text("Hello")
    with pytest.raises(CheckpointError, match="up to 259 .* has 200 rows"):
        evaluate.main(["--model", str(small), "--perplexity", str(tmp_path / "a.txt")])


def test_a_window_of_nothing_is_not_the_default(tiny, tmp_path):
    with pytest.raises(ConfigError, match="window is 0; it must be at least 1"):
        run(tiny, "--perplexity", tmp_path / "a.txt", "--window", 0)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> str:
    """A LoRA that changes the model's answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    turns = [[("user", f"Say {n}."), ("assistant", "so " * n)] for n in range(1, 13)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in turns]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_answers_are_compared_with_references_for_base_and_tuned(tiny, adapter, questions, tmp_path, capsys):
    output = tmp_path / "out.json"
    run(tiny, "--adapter", adapter, "--references", questions, "--max_new_tokens", 8, "--output", output,
        "--metrics", "exact_match,rouge,bleu,chrf,format,length,likelihood", "--answer_form", "json",
        "--max_rows", 11)  # fmt: skip
    result = json.loads(output.read_text())
    found = result["references"]
    assert result["base"] == tiny
    assert (found["answers"]["rows"], found["base_answers"]["rows"]) == (11, 11)
    assert found["scores"]["exact_match"]["value"] == found["base"]["exact_match"]["value"] == 0
    assert found["scores"]["length"]["value"] <= 8
    for name, compared in found["comparison"].items():
        ours, theirs = found["scores"][name]["value"], found["base"][name]["value"]
        assert compared["difference"] == pytest.approx(ours - theirs)
        assert compared["test"] == ("McNemar's exact test" if name in ("exact_match", "format") else "paired bootstrap")
    # The base's own numbers are those of a run without the adapter, to the bit: it is loaded anew.
    run(tiny, "--references", questions, "--max_new_tokens", 8, "--output", output, "--max_rows", 11, "--overwrite",
        "--metrics", "exact_match,rouge,bleu,chrf,format,length,likelihood", "--answer_form", "json")  # fmt: skip
    alone = json.loads(output.read_text())["references"]
    assert alone["scores"] == found["base"] and "comparison" not in alone
    assert found["scores"]["perplexity"] != found["base"]["perplexity"]
    printed = capsys.readouterr().out
    assert "references base rows 11, empty 0" in printed
    assert "the tuned model does not win on " in printed


def test_choices_are_compared_with_any_other_model(tiny, adapter, tmp_path, capsys):
    path, output = tmp_path / "quiz.jsonl", tmp_path / "out.json"
    rows = [{"prompt": f"{n}?", "choices": ["yes", "no", "a longer one"], "answer": n % 3} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    run(tiny, "--adapter", adapter, "--choices", path, "--output", output)
    found = json.loads(output.read_text())["choices"]
    assert set(found["scores"]) == {"accuracy", "accuracy_norm", "accuracy_bytes", "calibration_error"}
    run(tiny, "--choices", path, "--base", tiny, "--output", output, "--overwrite")
    same = json.loads(output.read_text())["choices"]
    assert same["scores"] == same["base"] == found["base"]
    assert {one["verdict"] for one in same["comparison"].values()} == {"undecided"}
    assert "the tuned model does not win on any metric" in capsys.readouterr().out


def test_a_base_that_is_an_adapter_is_named_as_one(tiny, adapter, questions, tmp_path, capsys):
    options = ("--references", questions, "--metrics", "likelihood", "--max_rows", 2, "--output", tmp_path / "out.json")
    run(tiny, "--base", adapter, *options)
    assert json.loads((tmp_path / "out.json").read_text())["base"] == f"{tiny} + {adapter}"
    assert f"base        {tiny} + {adapter}\n" in capsys.readouterr().out


def test_answers_are_not_generated_where_only_references_are_read(tiny, questions, tmp_path, monkeypatch, capsys):
    from minitune.evaluation import references

    run(tiny, "--references", questions, "--metrics", "pass@1,pass@2", "--samples", 2, "--max_new_tokens", 2)
    assert "pass@2             0 (all rows alike)" in capsys.readouterr().out
    monkeypatch.setattr(references, "generate_texts", lambda *_, **__: pytest.fail("answers were generated"))
    run(tiny, "--references", questions, "--metrics", "bits_per_byte")
    assert "references rows 12" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["references", "choices"])
def test_bad_rows_are_refused_before_the_model_is_loaded(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="rows.jsonl:1: "):
        evaluate.main(["--model", str(tmp_path / "nothing"), f"--{kind}", str(path)])


def test_classification_is_compared_with_the_base_on_the_same_rows(tiny, adapter, reviews, tmp_path, capsys):
    output = tmp_path / "out.json"
    run(tiny, "--adapter", adapter, "--classify", reviews, "--labels", "positive,negative", "--output", output,
        "--max_new_tokens", 4)  # fmt: skip
    result = json.loads(output.read_text())
    found = result["classification"]
    assert result["base"] == tiny
    compared = found["comparison"]
    assert set(compared) == {"accuracy", "macro_f1", "micro_f1", "format_compliance"}
    assert compared["accuracy"]["test"] == "McNemar's exact test"
    assert compared["macro_f1"]["test"] == "paired bootstrap"
    assert found["base_answers"]["rows"] == 3 and found["base_answers"]["confusion"] == [[0, 0, 2], [0, 0, 1]]
    printed = capsys.readouterr().out
    assert "the tuned model does not beat the base on accuracy: difference +0, p = 1 (McNemar's exact test)" in printed
    assert "base: right / answered" in printed and "tuned: right / answered" in printed


def test_several_models_are_measured_on_the_same_rows(tiny, adapter, questions, tmp_path, capsys):
    output = tmp_path / "out.json"
    options = ("--references", questions, "--metrics", "likelihood", "--max_rows", 11, "--overwrite")
    run(tiny, *options, "--also", f"[tuned={adapter},same={tiny}]", "--output", output)
    several = json.loads(output.read_text())
    assert "base" not in several and "comparison" not in several["references"]
    tuned, same = several["others"]["tuned"], several["others"]["same"]
    assert (tuned["adapter"], tuned["model"], same["model"]) == (adapter, tiny, tiny)
    assert same["references"]["comparison"]["perplexity"]["difference"] == 0
    run(tiny, *options, "--adapter", adapter, "--output", output)
    alone = json.loads(output.read_text())
    assert {**tuned["references"]} == alone["references"]
    assert "\ntuned:\nmodel  " in capsys.readouterr().out


def test_the_base_is_asked_in_its_best_way(tiny, adapter, reviews, tmp_path, capsys):
    rows = [{"prompt": f"film {n} was", "completion": ("positive", "negative")[n % 2]} for n in range(14)]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ways = [{"user": "Is this good? {}", "name": "asked"}, {"user": "{}", "shots": 2, "name": "shown"}]
    (tmp_path / "ways.jsonl").write_text("\n".join(map(json.dumps, ways)))
    output = tmp_path / "out.json"
    run(tiny, "--adapter", adapter, "--classify", reviews, "--labels", "positive,negative", "--max_new_tokens", 2,
        "--base_prompts", tmp_path / "ways.jsonl", "--validation", tmp_path / "validation.jsonl",
        "--output", output)  # fmt: skip
    found = json.loads(output.read_text())["classification"]
    asked = found["base_answers"]["prompt"]
    assert list(asked["tried"]) == ["as the rows ask, 0 examples", "asked, 0 examples", "shown, 2 examples"]
    assert asked["validation_rows"] == 12 and asked["name"] == "as the rows ask, 0 examples"  # all are wrong: the first
    assert "prompt" not in found and found["data"]["sha256"]
    printed = capsys.readouterr().out
    assert "base asked  as the rows ask, 0 examples (best of 3 ways on 12 validation rows: accuracy 0)" in printed
    (tmp_path / "one.jsonl").write_text(json.dumps(ways[0]))
    run(tiny, "--classify", reviews, "--labels", "positive,negative", "--max_new_tokens", 2,
        "--base_prompts", tmp_path / "one.jsonl")  # fmt: skip
    assert "base asked  asked, 0 examples (as given)" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"test.jsonl:1 asks what the test row .*test.jsonl:1 asks, and 2 more"):
        run(tiny, "--classify", reviews, "--labels", "positive,negative", "--validation", reviews)


def test_validation_rows_are_as_many_as_asked_for_and_texts_end_after_their_examples(tiny, tmp_path, monkeypatch):
    from minitune.evaluation import classification

    asked, rows = [], [{"prompt": f"film {n} was", "completion": ("positive", "negative")[n % 2]} for n in range(40)]
    for name, part in (("test", rows[:4]), ("validation", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def answers(model, tokenizer, prompts, *, stop, **_):
        asked.append((len(prompts), stop))
        shown = ["positive" if prompt.endswith(tuple(f" {n} was" for n in range(0, 40, 2))) else "negative"
                 for prompt in prompts]  # fmt: skip
        return [Answer(text, 1, True) if stop else Answer(f"{text}\n\nfilm", 16, False) for text in shown]

    monkeypatch.setattr(classification, "generate_texts", answers)
    run(tiny, "--classify", tmp_path / "test.jsonl", "--labels", "positive,negative", "--max_rows", 3,
        "--validation", tmp_path / "validation.jsonl", "--output", tmp_path / "out.json")  # fmt: skip
    assert asked == [(3, ())] * 3 + [(3, ("\n\n",))] * 7  # nine ways on validation rows, then the test rows
    found = json.loads((tmp_path / "out.json").read_text())["classification"]
    assert found["accuracy"] == 1.0 and found["prompt"]["shots"] == 4


def test_a_way_that_a_test_row_is_too_long_for_gives_place_to_the_next_best(tiny, tmp_path, monkeypatch, capsys):
    from minitune.evaluation import classification

    rows = [{"prompt": f"film {n}" + " long" * 20 * (n == 0), "completion": ("yes", "no")[n % 2]} for n in range(16)]
    for name, part in (("test", rows[:3]), ("validation", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def answers(model, tokenizer, prompts, *, stop, **_):
        if max(map(len, prompts)) > 140 and stop:
            raise DataError("prompt 1 has 141 tokens")
        last = [int(prompt.split("film ")[-1].split()[0]) for prompt in prompts]
        return [Answer(("yes", "no")[n % 2] if stop else "yes", 1, bool(stop) or "Answer" in prompts[0]) for n in last]

    monkeypatch.setattr(classification, "generate_texts", answers)
    run(tiny, "--classify", tmp_path / "test.jsonl", "--labels", "yes,no", "--output", tmp_path / "out.json",
        "--validation", tmp_path / "validation.jsonl")  # fmt: skip
    asked = json.loads((tmp_path / "out.json").read_text())["classification"]["prompt"]
    assert asked["name"] == "labels named, 0 examples"
    assert "as the rows ask, 4 examples: not for the test rows (prompt 1 has 141 tokens)" in capsys.readouterr().out


def test_rows_that_are_chats_or_texts_are_asked_as_texts_without_a_chat_template(tiny_folder, tmp_path):
    bare = tiny_folder(tmp_path / "bare", max_position_embeddings=1024)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    rows = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(16)]
    for name, part in (("test", rows[:3]), ("validation", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    run(str(bare), "--references", tmp_path / "test.jsonl", "--metrics", "exact_match,chrf", "--max_new_tokens", 2,
        "--validation", tmp_path / "validation.jsonl", "--output", tmp_path / "out.json")  # fmt: skip
    asked = json.loads((tmp_path / "out.json").read_text())["references"]["answers"]["prompt"]
    assert len(asked["tried"]) == 3 and asked["validation_rows"] == 5


def test_what_a_training_cost_is_measured_on_the_base_too(tiny, adapter, tmp_path, capsys):
    (tmp_path / "wiki.txt").write_text(TEXT * 8)
    quiz = [{"prompt": f"{n}?", "choices": ["yes", "no"], "answer": n % 2} for n in range(12)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, quiz)))
    (tmp_path / "bad.txt").write_text("How to rob?\nHow to lie?")
    (tmp_path / "good.txt").write_text("How to bake?\nHow to sing?")
    output = tmp_path / "out.json"
    run(tiny, "--adapter", adapter, "--general", f"{tmp_path}/wiki.txt,{tmp_path}/quiz.jsonl", "--window", 32,
        "--safety", tmp_path / "bad.txt", "--harmless", tmp_path / "good.txt", "--max_new_tokens", 4,
        "--output", output)  # fmt: skip
    result = json.loads(output.read_text())
    text, questions = result["forgetting"]["sets"].values()
    assert text["difference"] == pytest.approx(text["value"] / text["base"] - 1)
    assert (text["tokens"], questions["questions"]) == (len(TEXT) * 8 - 1, 12)
    assert result["forgetting"]["verdict"] in ("kept", "undecided", "slightly forgotten", "forgotten")
    assert result["safety"]["comparison"]["harmful"]["verdict"] == "undecided"  # two requests say nothing
    printed = capsys.readouterr().out
    assert "forgetting  verdict: " in printed and "safety      harmful refused: +0.0 points" in printed
    run(tiny, "--general", tmp_path / "wiki.txt", "--window", 32, "--output", output, "--overwrite")
    alone = json.loads(output.read_text())["forgetting"]
    assert alone["verdict"] is None
    assert next(iter(alone["sets"].values()))["value"] == pytest.approx(text["base"])


@pytest.mark.parametrize(
    "options, line",
    [
        (("--general", "x.jsonl"), "general data are a .txt file"),
        (("--general", "nothing.txt"), "nothing.txt: no such file"),
        (("--general", "x.jsonl,"), "general is 'x.jsonl,'; give names between commas"),
        (("--safety", "x.jsonl", "--harmless", "empty.jsonl"), "the file is empty"),
        (("--safety", "text.jsonl"), "a text without a question"),
        (("--general", "x.jsonl", "--harmless", "x.jsonl"), "harmless is set without safety"),
        (("--general", "x.jsonl", "--validation", "x.jsonl"), "validation is set without classify or references"),
        (("--classify", "x.jsonl", "--labels", "b,c", "--choices", "q.jsonl", "--validation", "x.jsonl"), "at a time"),
        (("--classify", "x.jsonl", "--labels", "b,c", "--base_prompts", "x.jsonl"), "or give other rows .way: user"),
        (("--references", "x.jsonl", "--verifier", "nowhere"), "write it as package.module:function"),
        (("--references", "x.jsonl", "--metrics", "verified"), "need a verifier"),
        (("--references", "imdb:tset"), "did you mean 'test'"),
        (("--choices", "q.jsonl", "--verifier", "a:b"), "verifier is set without references"),
        (("--safety", "x.jsonl", "--window", "8"), "window is set without perplexity or general"),
    ],
)
def test_data_that_say_nothing_of_a_model_are_refused(tiny, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}')
    with pytest.raises((ConfigError, DataError, CheckpointError), match=line):
        evaluate.main(["--model", "no_model_is_loaded", *options])
