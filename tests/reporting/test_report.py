"""The report as Markdown and as a page: what it says, what it says was not measured, and gates."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
import yaml

from minitune import report, train
from minitune.errors import ConfigError
from minitune.evaluation.bootstrap import paired_difference, ratio_of
from minitune.reporting.document import Chart, Code, Paragraph, Section, Table, html, markdown
from minitune.reporting.journal import read_rows_of
from minitune.reporting.record import read_run
from minitune.reporting.report import write_report
from tests.reporting.faults import quick

SECTIONS = ["Result", "Before and after", "Diagnosis", "Loss", "Data", "More data", "Forgetting", "Safety", "Samples",
            "Cost", "Use it", "Configuration"]  # fmt: skip


@pytest.fixture(scope="module")
def options(tiny_folder, tmp_path_factory):
    """The command line of a run, but for its output."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"{i}|<b>?", "completion": "yes " * (i % 3 + 1)} for i in range(80)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    finding = {"kind": "mixed_formats", "level": "warning", "count": 3, "rows": [], "message": "odd", "remedy": "even"}
    (folder / "report.json").write_text(json.dumps({"findings": [finding]}))
    (folder / "wiki.txt").write_text("Of general things there is much to say. " * 60)
    return ["--model", str(tiny_folder(folder / "model")), "--data", str(folder / "rows.jsonl"), "--max_steps", "12",
            "--validation_fraction", "0.3", "--optimizer.learning_rate", "0.01", "--batch_size", "2",
            "--accumulation_steps", "1", "--max_length", "64", "--dtype", "float32", "--evaluation.general",
            str(folder / "wiki.txt"), "--evaluation.general_tokens", "2400"]  # fmt: skip


@pytest.fixture(scope="module")
def done(options, tmp_path_factory):
    """A finished run that was held to two gates, one of which it cannot pass, and its exit code."""
    folder = tmp_path_factory.mktemp("done") / "run"
    gates = ["--require", "gain>0", "--require", "general.ratio<0.01"]
    with quick():
        return folder, train.main([*options, "--output", str(folder), *gates])


@pytest.fixture
def run(done, tmp_path):
    """A copy of it that may be changed."""
    return shutil.copytree(done[0], tmp_path / "run")


def test_both_reports_have_every_section_with_the_same_words(done):
    text, page = ((done[0] / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert re.findall(r"^## (.*)", text, re.M) == SECTIONS == re.findall(r"<h2>(.*?)</h2>", page)
    outcome = json.loads((done[0] / "outcome.json").read_text())
    ratio = f"x {outcome['general']['ratio']:.3f}"
    for part in (f"{outcome['base_loss']:.4f}", f"{outcome['best_loss']:.4f}", ratio, "paired bootstrap", "energy",
                 "python -m minitune.evaluate --model", "--safety donotanswer"):  # fmt: skip
        assert part in text and part in page, part
    assert "rows.jsonl | warning | mixed_formats | 3 | odd | even |" in text, "what prepare found in this file"
    assert "still goes on" not in text
    assert "unknown" in text.split("energy")[1][:12]


def test_the_gain_and_its_interval_are_those_of_the_rows(done):
    outcome = json.loads((done[0] / "outcome.json").read_text())
    base, best = (read_rows_of(done[0], step) for step in (0, outcome["best_step"]))
    for rows, loss in ((base, outcome["base_loss"]), (best, outcome["best_loss"])):
        assert sum(loss for loss, _ in rows) / sum(count for _, count in rows) == pytest.approx(loss, rel=1e-5)
    losses = [ratio_of(*zip(*rows, strict=True)) for rows in (base, best)]
    assert [outcome["gain"]["value"], *outcome["gain"]["interval"]] == pytest.approx(paired_difference(*losses))
    assert outcome["gain"]["value"] == pytest.approx(outcome["base_loss"] - outcome["best_loss"], abs=1e-5)
    assert (
        len(best)
        == outcome["gain"]["rows"]
        == json.loads((done[0] / "data.json").read_text())[0]["validation_examples"]
    )


def test_general_text_is_measured_with_the_weights_before_and_after(done, options):
    import dataclasses

    from minitune.evaluation.perplexity import perplexity
    from minitune.loading import ModelOptions

    outcome, text = json.loads((done[0] / "outcome.json").read_text()), open(options[-3]).read()
    for adapter, when in ((None, "before"), (str(done[0] / "adapter"), "after")):
        model, tokenizer = ModelOptions(model=options[1], adapter=adapter, dtype="float32").load()
        found = dataclasses.asdict(perplexity(model, tokenizer, text, window=256, max_tokens=2400))
        assert outcome["general"][when]["value"] == pytest.approx(found["perplexity"], rel=1e-4), when
        assert outcome["general"][when]["interval"] == pytest.approx(found["interval"], rel=1e-4), when


def test_a_run_that_passes_not_every_gate_ends_with_3_and_all_its_results(done):
    folder, code = done
    assert code == 3 and (folder / "adapter").is_dir()
    gates = json.loads((folder / "outcome.json").read_text())["gates"]
    assert [(gate["gate"], gate["passed"]) for gate in gates] == [("gain>0", True), ("general.ratio<0.01", False)]
    assert "FAILED" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    "gate,part",
    [("acuracy>=1", "'acuracy'"), ("accuracy>=0.8", "'accuracy'"), ("best_los<1", "did you mean 'best_loss'"),
     ("best_loss", "write a name"), ("general.ratio<1", "evaluation.general is not set")],
)  # fmt: skip
def test_a_gate_that_a_run_cannot_be_held_to_is_refused_before_the_work(options, tmp_path, gate, part):
    with pytest.raises(ConfigError, match=re.escape(part)):
        train.main([*options[:-4], "--output", str(tmp_path / "run"), "--require", gate])
    assert not (tmp_path / "run").exists()


class Links(HTMLParser):
    """Collects what a page would fetch, and its tags."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]


def test_the_page_asks_nothing_of_a_network_and_texts_stay_texts(run):
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metrics]
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m | a\n```\n# head"
    for line in lines:
        for sample in line.get("samples", ()):
            sample |= {"answer": evil, "prompt": evil, "expected": evil}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"model": "<img src=x>|m"}))
    files = json.loads((run / "data.json").read_text())
    files[0]["path"] = "a|b\n<script>.jsonl"
    (run / "data.json").write_text(json.dumps(files))
    text, page = (path.read_text() for path in write_report(run))
    links = Links()
    links.feed(page)
    assert links.found == [] and not {"script", "img", "link", "iframe"} & set(links.tags)
    assert "url(" not in page and "@import" not in page and "\x1b" not in page + text
    assert "<script>" not in re.sub(r"(?m)^(    .*|```[\s\S]*?```)$", "", text), "outside of code"
    assert r"a\|b &lt;script>.jsonl" in text


def test_results_in_the_run_folder_are_read_in_and_gated(run, capsys):
    scores = {"accuracy": {"value": 0.9, "interval": [0.8, 0.95], "interval_by": "Wilson"}}
    base = {"accuracy": {"value": 0.6, "interval": [0.5, 0.7], "interval_by": "Wilson"}}
    compared = {
        "difference": 0.3,
        "interval": [0.2, 0.4],
        "test": "McNemar's exact test",
        "verdict": "wins",
        "p": 0.001,
    }
    result = {
        "model": "m", "adapter": "a", "classification": {"scores": scores, "base": base,
                                                         "comparison": {"accuracy": compared}},
        "perplexity": {"perplexity": 9.5, "interval": [9.0, 10.0]},
        "forgetting": {"verdict": "forgotten", "sets": {"wiki": {
            "kind": "perplexity", "value": 30.0, "base": 20.0, "difference": 0.5, "difference_interval": [0.4, 0.6],
            "test": "paired bootstrap over windows", "verdict": "forgotten"}}},
        "safety": {"tuned": {"harmful": {"refusal_rate": 0.5}, "harmless": {"over_refusal": 0.1}}},
    }  # fmt: skip
    (run / "evaluations").mkdir()
    (run / "evaluations" / "test.json").write_text(json.dumps(result))
    arguments = [
        str(run),
        "--require",
        "accuracy>=0.85",
        "--require",
        "accuracy.low>=0.8",
        "--require",
        "refusal_rate>0.4",
    ]
    with quick():
        assert report.main(arguments) == 0
        assert report.main([str(run), "--require", "perplexity.perplexity<9", "--require=accuracy>0.85"]) == 3
    printed = capsys.readouterr().out
    assert "gate passed: accuracy.low>=0.8 (evaluations.test.classification.accuracy.low is 0.8)" in printed
    text = (run / "report.md").read_text()
    row = "0.6 (0.5 to 0.7) | 0.9 (0.8 to 0.95) | +0.3 (+0.2 to +0.4) | wins (McNemar's exact test, p = 0.001)"
    assert f"| test, classification: accuracy | {row} |" in text
    wiki = "| test: wiki, perplexity | 20 | 30 | +50.0 % (+40.0 to +60.0) | forgotten (paired bootstrap over windows) |"
    assert wiki in text and "**Verdict**: forgotten" in text
    assert "refusal rate of harmful requests" in text and "Not measured" not in text.split("## Safety")[1]
    assert "**Forgetting**: evaluations/test.json: the verdict" in text
    with pytest.raises(ConfigError, match="nothing measured is called 'acuracy'; did you mean 'accuracy'"), quick():
        report.main([str(run), "--require", "acuracy>=1"])


def test_what_has_two_models_stands_side_by_side(run):
    rates = [{"pass_rate": {"value": value, "interval": [low, high], "rows": 10}, "tags": {"form": {"value": value}}}
             for value, low, high in ((0.2, 0.1, 0.4), (0.6, 0.3, 0.8))]  # fmt: skip
    compared = {"difference": 0.4, "interval": [0.1, 0.7], "test": "McNemar's exact test", "verdict": "wins", "p": 0.03}
    golden = {"base": rates[0], "tuned": rates[1], "comparison": compared, "changes": {"fixed": 4}, "rows": 10}
    (run / "evaluations").mkdir()
    (run / "evaluations" / "mine.json").write_text(json.dumps({"model": "m", "golden": golden}))
    text = write_report(run)[0].read_text()
    verdict = "+0.4 (+0.1 to +0.7) | wins (McNemar's exact test, p = 0.03)"
    assert f"| mine, golden: pass_rate | 0.2 (0.1 to 0.4) | 0.6 (0.3 to 0.8) | {verdict} |" in text
    assert "| mine, golden: tags.form | 0.2 | 0.6 |  |  |" in text and "| mine, golden: changes.fixed |  | 4 |" in text


def test_what_a_curve_said_of_more_data_is_read_in(run):
    assert "Whether more data would help is not measured" in write_report(run)[0].read_text()
    forecast = {
        "times": 2.0,
        "rows": 600,
        "value": 0.25,
        "interval": [0.2, 0.3],
        "gain": 0.1,
        "gain_interval": [0, 0.2],
    }
    folder = run / "evaluations" / "curve"
    folder.mkdir(parents=True)
    found = {"measure": "loss", "curve": {"forecasts": [forecast]}, "advice": "collect more"}
    (folder / "curve.json").write_text(json.dumps(found))
    for path in write_report(run):
        text = path.read_text()
        assert "collect more" in text and "0.2 to 0.3" in text and "would help is not" not in text
    (folder / "curve.json").write_text(json.dumps(found | {"curve": None, "advice": "no law goes through the points"}))
    assert "no law goes through the points" in write_report(run)[0].read_text()


def test_what_is_not_there_is_said_and_not_made_up(run):
    for name in ("outcome.json", "facts.json", "rows.json"):
        (run / name).unlink()
    text = write_report(run)[0].read_text()
    assert "it did not finish" in text and "There is no result to load" in text
    assert "the rows' own losses are not known" in text
    assert text.split("## Forgetting")[1].strip().startswith("Not measured")


def test_a_resumed_run_keeps_what_was_measured_before_it(done, tmp_path):
    run = shutil.copytree(done[0], tmp_path / "again")
    before = json.loads((run / "outcome.json").read_text())
    with quick():
        train.main(["--output", str(run), "--resume"])
    after = json.loads((run / "outcome.json").read_text())
    for name in ("gain", "base_loss", "best_loss"):
        assert after[name] == before[name]
    assert after["general"]["ratio"] == pytest.approx(before["general"]["ratio"], rel=1e-6)
    assert read_run(run).data == read_run(done[0]).data


def test_parts_render_twice():
    parts = [Paragraph("a < b", "Lead"), Table(("x", "y"), [("a|b", 1234), (None, 0.123456)]), Code("ls", "sh"),
             Code("text\nmore", folded="All"),
             Chart("C", {"s": [(0, 1.0), (1, 2.0)]}, "x", "y", picture="c.png")]  # fmt: skip
    text = markdown("T", [Section("S", parts), Section("empty", [])])
    assert text == (
        "# T\n\n## S\n\n**Lead**: a &lt; b\n\n| x | y |\n| --- | --- |\n| a\\|b | 1,234 |\n|  | 0.1235 |\n\n"
        "```sh\nls\n```\n\nAll:\n\n    text\n    more\n\n![C](c.png)\n"
    )
    page = html("T", [Section("S", parts), Section("empty", [])])
    assert "<strong>Lead</strong>: a &lt; b" in page and "<details><summary>All</summary>" in page
    assert "<svg" in page and "empty" not in page
