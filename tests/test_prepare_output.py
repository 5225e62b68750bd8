"""`prepare --output`: what lies in the folder, what its report says, and every refusal in one line."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minitune.cli import parse
from minitune.data.formats import read_records
from minitune.data.splits import split_by_hash
from minitune.errors import MinituneError
from minitune.prepare import main
from minitune.training.config import TrainConfig
from tests.data.conftest import save_byte_tokenizer

ROWS = [
    {"instruction": f"Number {i}, is it even?", "output": "no" if i % 2 else "yes", "book": i // 10} for i in range(100)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with a byte-level ChatML tokenizer."""
    return str(save_byte_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture
def prepare(tmp_path, model, monkeypatch, capsys):
    """Return a function that prepares rows in an empty folder: (exit code, what was printed)."""
    monkeypatch.chdir(tmp_path)
    save("rows.jsonl", ROWS)

    def run(*arguments, files=("rows.jsonl",)):
        code = main([*files, "--model", model, "--rows", "0", *arguments])
        return code, capsys.readouterr().out

    return run


def save(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines(name):
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").split("\n") if line]


def test_a_folder_is_written_with_every_row_once_and_a_command_to_go_on(prepare, model):
    code, shown = prepare("--output", "out", "--golden", "10", "--stratify", "answer")
    assert code == 0
    names = ("train", "validation", "test", "golden", "removed", "leaks")
    assert {path.name for path in Path("out").iterdir()} == {*(f"{name}.jsonl" for name in names), "report.json",
                                                             "report.html"}  # fmt: skip
    parts = {name: lines(f"out/{name}.jsonl") for name in names}
    assert {name: len(rows) for name, rows in parts.items()} == {
        "train": 72, "validation": 9, "test": 9, "golden": 10, "removed": 0, "leaks": 0,
    }  # fmt: skip
    origins = [row["source"]["origin"] for name in names[:3] for row in parts[name]] + [
        r["id"] for r in parts["golden"]
    ]
    assert sorted(origins) == sorted(f"rows.jsonl:{i}" for i in range(1, 101))
    by_origin = {f"rows.jsonl:{i}": row for i, row in enumerate(ROWS, 1)}
    for row in parts["test"]:
        source = row.pop("source")
        assert row == by_origin[source["origin"]] and source["role"] == "training" and source["format"] == "alpaca"
    for row in parts["golden"]:
        asked = by_origin[row["id"]]
        assert row["messages"] == [{"role": "user", "content": asked["instruction"]}]
        assert (row["expect"], row["tags"]) == ({"exact": asked["output"]}, [asked["output"]])
    assert sum(row["expect"]["exact"] == "yes" for row in parts["golden"]) == 5
    (command,) = re.findall(r"next: python -m minitune.train (.*)", shown)
    config = parse(TrainConfig, command.split(), prog="train", description="")
    assert (config.model, config.data, config.validation) == (model, "out/train.jsonl", "out/validation.jsonl")
    assert "train          72 rows (72.0%)" in shown and "training would accept these files" in shown


@pytest.mark.parametrize("options", [[], ["--exact_sizes"], ["--weights", "[1,2]"]])
def test_a_validation_fraction_of_what_is_written_is_one_of_all_its_questions(prepare, options):
    more = [{"instruction": f"Is {i} a prime?", "output": "no"} for i in range(400)]
    save("one.jsonl", more[:200])
    save("two.jsonl", more[200:])
    prepare("--output", "out", *options, files=("one.jsonl", "two.jsonl"))
    records = read_records("out/train.jsonl")
    parts = split_by_hash(records, {"training": 0.8, "validation": 0.2}, 0)
    assert abs(len(parts["validation"]) / len(records) - 0.2) < 3 * (0.2 * 0.8 / len(records)) ** 0.5


def test_a_golden_set_is_what_evaluation_reads(prepare):
    from minitune.evaluation.golden import read_golden

    prepare("--output", "out", "--golden", "3")
    assert [row.texts["exact"] for row in read_golden("out/golden.jsonl")] == [
        [row["expect"]["exact"]] for row in lines("out/golden.jsonl")
    ]


def test_the_same_command_writes_the_same_bytes(prepare):
    before = None
    for options in ([], ["--overwrite"]):
        prepare("--output", "out", "--group", "book", "--exact_sizes", *options)
        after = {path.name: path.read_bytes() for path in Path("out").glob("*.jsonl")}
        assert before in (None, after)
        before = after
    books = [{row["book"] for row in lines(f"out/{name}.jsonl")} for name in ("train", "validation", "test")]
    assert sum(map(len, books)) == 10 and [len(one) for one in books] == [8, 1, 1]


def test_golden_rows_are_nowhere_else_not_even_nearly(prepare):
    long = " ".join(f"word{i}" for i in range(60))
    twins = [{"instruction": f"{long} {end}", "output": "a"} for end in ("one", "two", "three")]
    save("rows.jsonl", [*ROWS, *twins, {"instruction": f" {long.upper()}  ONE", "output": "b"}])
    save("golden.jsonl", [{"prompt": f"{long} one"}])
    prepare("--output", "out", "--golden", "golden.jsonl")
    assert [row["id"] for row in lines("out/golden.jsonl")] == ["rows.jsonl:101"]
    reasons = {row["origin"]: row["reason"] for row in lines("out/removed.jsonl")}
    assert reasons["rows.jsonl:104"] == "asks what a golden row asks: rows.jsonl:101"
    assert all(reasons[f"rows.jsonl:{i}"].startswith("near leak: rows.jsonl:101 of golden (0.9") for i in (102, 103))
    assert lines("out/removed.jsonl")[0]["row"]["output"] == "b"


def test_what_is_of_a_golden_rows_group_is_nowhere_else(prepare):
    save("named.jsonl", [{"prompt": ROWS[i]["instruction"]} for i in (5, 31)])
    prepare("--output", "out", "--golden", "named.jsonl", "--group", "book", "--exact_sizes")
    assert [row["id"] for row in lines("out/golden.jsonl")] == ["rows.jsonl:6", "rows.jsonl:32"]
    books = {row["book"] for name in ("train", "validation", "test") for row in lines(f"out/{name}.jsonl")}
    assert books == {1, 2, 4, 5, 6, 7, 8, 9}
    reasons = {row["origin"]: row["reason"] for row in lines("out/removed.jsonl")}
    assert len(reasons) == 18 and reasons["rows.jsonl:31"] == "has the book of a golden row: rows.jsonl:32"
    judged = [
        {"prompt": f"Number {i}, is it even?", "completion": "yes", "label": i % 2 == 0, "book": i // 10}
        for i in range(100)
    ]
    save("judged.jsonl", judged)
    prepare("--output", "judged", "--golden", "5", "--group", "book", "--exact_sizes", files=("judged.jsonl",))
    golden = {int(row["id"].partition(":")[2]) // 10 for row in lines("judged/golden.jsonl")}
    assert not golden & {row["book"] for row in lines("judged/train.jsonl")}


def test_golden_rows_of_groups_are_whole_groups(prepare):
    prepare("--output", "out", "--golden", "20", "--group", "book", "--exact_sizes")
    books = [ROWS[int(row["id"].partition(":")[2]) - 1]["book"] for row in lines("out/golden.jsonl")]
    assert len(books) == 20 and sorted(books) == sorted([*set(books)] * 10)
    assert not {row["book"] for name in ("train", "validation", "test") for row in lines(f"out/{name}.jsonl")} & {
        *books
    }


def test_files_are_weighed_against_each_other(prepare):
    save("more.jsonl", [{"prompt": f"More {i}?", "completion": "x"} for i in range(100)])
    prepare("--output", "out", "--weights", "[3,1]", "--exact_sizes", files=("rows.jsonl", "more.jsonl"))
    facts = json.loads(Path("out/report.json").read_text())["prepared"]
    first, second = facts["mixture"]
    # of 200 rows 160 are for training, some 80 of each file; the first is the scarce one
    assert (first["rows"], second["rows"]) == (first["of"], round(first["of"] / 3))
    assert facts["splits"]["train"] == 160 and facts["lines"]["train"] == first["rows"] + second["rows"]
    assert {row["source"]["format"] for row in lines("out/train.jsonl")} == {"alpaca", "prompt_completion"}


def test_leaks_are_listed_and_taken_out_on_request(prepare):
    save("exam.jsonl", [{"q": ROWS[3]["instruction"], "a": "no"}, {"q": "Something else altogether?", "a": "no"}])
    code, shown = prepare("--output", "out", "--evaluation_sets", "[exam.jsonl]")
    assert code == 0 and re.search(r"leaks +1 row of (train|validation|test) in exam.jsonl \(exact\)", shown)
    (leak,) = lines("out/leaks.jsonl")
    assert (leak["row"], leak["held_row"]) == ("rows.jsonl:4", "exam.jsonl:1")
    prepare("--output", "out", "--overwrite", "--evaluation_sets", "exam.jsonl", "--leaks", "remove")
    (gone,) = lines("out/removed.jsonl")
    assert (gone["origin"], gone["step"], gone["row"]) == ("rows.jsonl:4", "leaks", ROWS[3])
    assert sum(len(lines(f"out/{name}.jsonl")) for name in ("train", "validation", "test")) == 99


def test_sets_that_evaluation_knows_by_name_are_looked_at_too(prepare, monkeypatch):
    from minitune.data.formats import Record
    from minitune.evaluation import sets

    turns = ({"role": "user", "content": f" {ROWS[8]['instruction']}"}, {"role": "assistant", "content": "yes"})
    monkeypatch.setattr(sets, "is_set", lambda name: name == "imdb:test")
    monkeypatch.setattr(sets, "rows_of", lambda name: [Record("imdb:test:1", "messages", messages=turns)])
    _, shown = prepare("--output", "out", "--evaluation_sets", "imdb:test")
    assert [(leak["row"], leak["held_row"]) for leak in lines("out/leaks.jsonl")] == [("rows.jsonl:9", "imdb:test:1")]
    assert "looked at      1 row of imdb:test" in shown


def test_test_rows_may_be_in_an_evaluation_set_but_not_in_the_golden_set(prepare):
    prepare("--output", "out", "--exact_sizes")
    test = [row["instruction"] for row in lines("out/test.jsonl")]
    save("exam.jsonl", [{"q": question} for question in test])
    prepare("--output", "out", "--overwrite", "--exact_sizes", "--evaluation_sets", "exam.jsonl", "--leaks", "remove")
    assert lines("out/leaks.jsonl") == [] and len(lines("out/test.jsonl")) == 10


def test_rehearsal_rows_are_looked_at_as_training_rows(prepare):
    save("general.jsonl", [{"prompt": f"General {i}?", "completion": "x"} for i in range(50)])
    save("exam.jsonl", [{"q": "What is general 7 for you?"}, {"q": "General   7?  "}, {"q": "tell me: general 7?"}])
    prepare("--output", "out", "--rehearsal", "general.jsonl", "--evaluation_sets", "exam.jsonl", "--leaks", "remove",
            "--shortage", "less", "--rehearsal_share", "0.4")  # fmt: skip
    assert lines("out/leaks.jsonl") == []  # two words are not taken for a question
    long = [{"prompt": f"Say something general about the number {i}, please?", "completion": "x"} for i in range(50)]
    save("general.jsonl", long)
    save("exam.jsonl", [{"q": f" {long[7]['prompt'].upper()}"}])
    prepare("--output", "out", "--overwrite", "--rehearsal", "general.jsonl", "--evaluation_sets", "exam.jsonl",
            "--leaks", "remove", "--shortage", "less", "--rehearsal_share", "0.4")  # fmt: skip
    assert [leak["row"] for leak in lines("out/leaks.jsonl")] == ["general.jsonl:8"]
    assert [gone["origin"] for gone in lines("out/removed.jsonl")] == ["general.jsonl:8"]
    written = {row["source"]["origin"] for row in lines("out/train.jsonl") if row["source"]["role"] == "rehearsal"}
    assert len(written) == 49 and "general.jsonl:8" not in written


def test_cleaning_is_done_as_asked_and_said(prepare):
    save(
        "rows.jsonl",
        [*ROWS, ROWS[0], {"instruction": "Mail?", "input": "to a.b@mail.org", "output": "Yes, <b>now</b>."}],
    )
    _, shown = prepare("--output", "out")
    assert "exact_duplicate (1 row)" in shown and "--clean.remove '[exact_duplicate]'" in shown
    assert "101 rows" not in shown and lines("out/removed.jsonl") == []
    _, shown = prepare("--output", "out", "--overwrite", "--clean.remove", "[exact_duplicate]",
                       "--clean.repair", "[personal_data,markup]")  # fmt: skip
    (gone,) = lines("out/removed.jsonl")
    assert (gone["origin"], gone["step"], gone["reason"]) == ("rows.jsonl:101", "clean", "exact_duplicate")
    rows = [row for name in ("train", "validation", "test") for row in lines(f"out/{name}.jsonl")]
    (mail,) = (row for row in rows if row["instruction"] == "Mail?")
    assert (mail["input"], mail["output"]) == ("to [EMAIL]", "Yes, now.")
    assert "changed        1 row by markup" in shown and "left out       1 row: exact_duplicate" in shown


def test_sources_are_mixed_and_their_origins_kept(prepare, model):
    save("chat.jsonl", [{"prompt": f"General question {i}", "completion": "general " * 20} for i in range(50)])
    save("safe.jsonl", [{"messages": [{"role": "user", "content": f"Bad thing {i}"},
                                      {"role": "assistant", "content": "No."}]} for i in range(50)])  # fmt: skip
    options = ["--rehearsal", "chat.jsonl", "--safety", "safe.jsonl", "--safety_share", "0.1", "--exact_sizes"]
    code, shown = prepare("--output", "out", *options)
    # 80 rows / 0.7 = 114.3, a fifth of which is 22.9 and a tenth 11.4
    assert code == 0 and "mixture        rehearsal chat.jsonl: 23 of 50 rows, 20.2% of the rows" in shown
    roles = [row["source"]["role"] for row in lines("out/train.jsonl")]
    assert [roles.count(role) for role in ("training", "rehearsal", "safety")] == [80, 23, 11]
    assert all(row["source"]["role"] == "training" for row in lines("out/validation.jsonl"))
    assert len(read_records("out/train.jsonl")) == 114
    # 80 answers of 2 or 3 bytes and an end are 280 target tokens; a fifth beside them is 70, and one answer has 161
    save("short.jsonl", [{"prompt": f"General question {i}", "completion": "x" * 9} for i in range(50)])
    options = ["--rehearsal", "short.jsonl", "--share_of", "target_tokens", "--stratify", "answer"]
    _, shown = prepare("--output", "out", "--overwrite", *options)
    facts = json.loads(Path("out/report.json").read_text())["prepared"]["mixture"]
    assert [(part["rows"], part["target_tokens"]) for part in facts] == [(80, 280), (7, 70)]
    assert "20.0% of the target tokens" in shown


def test_a_prepared_file_names_its_origins_in_a_run(prepare, model):
    from minitune.data.corpus import Encoding, Source, load_corpus
    from minitune.text.tokenizer import load_tokenizer

    save("other.jsonl", [{"prompt": f"General {i}", "completion": "x"} for i in range(50)])
    prepare("--output", "out", "--rehearsal", "other.jsonl", "--exact_sizes")
    sources = [Source("out/train.jsonl")], [Source("out/validation.jsonl")]
    files = load_corpus(*sources, load_tokenizer(model), Encoding(200)).files
    assert files[0]["origins"] == [{"path": "rows.jsonl", "role": "training", "examples": 80},
                                   {"path": "other.jsonl", "role": "rehearsal", "examples": 20}]  # fmt: skip
    assert files[1]["origins"] == [{"path": "rows.jsonl", "role": "training", "examples": 10}]


@pytest.mark.parametrize(
    ("rows", "objective", "labels"),
    [
        ([{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(40)], "dpo", None),
        ([{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(40)], "kto", "answer"),
    ],
)
def test_preferences_are_split_and_named_to_training(prepare, rows, objective, labels):
    save("rows.jsonl", rows)
    options = ["--stratify", labels] if labels else ["--exact_sizes"]
    code, shown = prepare("--output", "out", "--golden", "4", *options)
    assert code == 0 and f"--objective {objective}" in re.search("next: .*", shown)[0]
    assert {name: len(lines(f"out/{name}.jsonl")) for name in ("train", "validation", "test", "golden")} == {
        "train": 29, "validation": 4, "test": 3, "golden": 4,
    }  # fmt: skip
    expected = {row["prompt"]: row.get("chosen", row.get("completion")) for row in rows}
    for row in lines("out/golden.jsonl"):
        assert row["expect"] == {"exact": expected[row["prompt"]]}


class Links(HTMLParser):
    """Collects what a page would fetch, and its tags."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "data", "action")]


def test_the_page_says_what_the_json_says_and_fetches_nothing(prepare):
    evil = '<script>alert("x")</script><img src=x>'
    save("rows.jsonl", [*ROWS, *[{"instruction": f"{evil} {'again ' * 20}", "output": evil, "book": evil}] * 2])
    save("exam.jsonl", [{"q": ROWS[3]["instruction"] + evil}, {"q": ROWS[5]["instruction"]}])
    prepare("--output", "out", "--stratify", "answer", "--evaluation_sets", "exam.jsonl")
    page, content = Path("out/report.html").read_text(encoding="utf-8"), json.loads(Path("out/report.json").read_text())
    links = Links(page)
    assert links.fetched == [] and "img" not in links.tags and "script" not in links.tags
    assert links.tags.count("svg") == 3  # splits, labels, lengths
    for fact in (
        *content["prepared"]["splits"].values(),
        content["tokens"],
        *content["prepared"]["labels"][0].values(),
    ):
        assert f"{fact:,}" in page if isinstance(fact, int) else fact in page
    assert content["prepared"]["next"].split()[3] == "--data"
    assert "exact duplicate, 1 row" in page
    assert content["prepared"]["options"]["stratify"] == "answer"


def test_what_training_would_refuse_is_written_but_said(prepare):
    save("rows.jsonl", [*ROWS, *[{"instruction": f"{i} " + "x" * 300, "output": "y"} for i in range(30)]])
    code, shown = prepare("--output", "out", "--max_length", "200")
    assert code == 1 and "next:" not in shown
    assert re.search(r"\d+ x a row over max_length 200", shown)
    assert re.search(r"1 x \d of \d+ rows (is|are) over max_length 200 .*out/validation.jsonl", shown)
    code, shown = prepare("--output", "out", "--overwrite", "--max_length", "200", "--truncate", "drop")
    assert code == 0 and "--max_length 200 --truncate drop" in shown


def test_malformed_rows_stop_it_or_are_left_out_with_their_reason(prepare):
    with open("rows.jsonl", "a") as file:
        file.write('{"instruction": "q", "output": ""}\n{broken\n')
    with pytest.raises(MinituneError, match=r"rows.jsonl:101: a row without an answer; .*1 more such row.*--malformed"):
        prepare("--output", "out")
    assert not Path("out").exists()
    code, shown = prepare("--output", "out", "--malformed", "drop")
    first, second = lines("out/removed.jsonl")
    assert (first["origin"], first["step"], first["row"]["instruction"]) == ("rows.jsonl:101", "read", "q")
    assert second["reason"].startswith("broken JSON") and second["row"] == {}
    assert code == 0 and "2 malformed left out" in shown


def test_findings_are_shown_without_writing_anything(prepare):
    save("rows.jsonl", [*ROWS, ROWS[0]])
    code, shown = prepare("--json", "report.json")
    assert code == 0 and "exact_duplicate (1 row)" in shown and "next:" not in shown
    kinds = {one["kind"]: one["option"] for one in json.loads(Path("report.json").read_text())["findings"]}
    assert kinds["exact_duplicate"] == "--clean.remove '[exact_duplicate]'"
    assert {path.name for path in Path().iterdir()} == {"rows.jsonl", "report.json"}


OUT = ["--output", "out"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--golden", "3"], "golden is set, but rows are written only with --output FOLDER"),
        (["--clean.remove", "[markup]"], "clean is set, but rows are written only"),
        (["--overwrite"], "overwrite is set, but"),
        ([*OUT, "--split", "[0.8,0.1,0.2]"], "their sum is 1"),
        ([*OUT, "--split", "[0.8,0.2]"], "split"),
        ([*OUT, "--group", "boook"], "no value in the field 'boook'; fill it in, or choose another field"),
        ([*OUT, "--stratify", "instruction"], "100 different values in 100 rows are no labels"),
        ([*OUT, "--golden", "100"], "golden is 100, of 100 different questions"),
        ([*OUT, "--golden", "0"], "golden is 0, of"),
        ([*OUT, "--golden", "-3"], "golden is '-3', neither a number of rows nor a file"),
        ([*OUT, "--golden", "none.jsonl"], "golden is 'none.jsonl', neither a number of rows nor a file"),
        ([*OUT, "--golden", "odd.jsonl"], "odd.jsonl:1: no row asks this; golden rows are taken out of the data"),
        ([*OUT, "--evaluation_sets", "rows.jsonl"], "evaluation set rows.jsonl is rows.jsonl itself"),
        ([*OUT, "--evaluation_sets", "nothing.jsonl"], "nothing.jsonl: no such file"),
        ([*OUT, "--evaluation_sets", "."], "evaluation set . is rows.jsonl itself"),
        ([*OUT, "--evaluation_sets", "aclsum:tset"], "the set aclsum has the parts train, validation, test; did you"),
        ([*OUT, "--rehearsal", "rows.jsonl"], "rows.jsonl is given twice"),
        ([*OUT, "--rehearsal", "copy.jsonl"], "copy.jsonl has the same content as rows.jsonl"),
        ([*OUT, "--exact_sizes", "--rehearsal", "odd.jsonl", "--rehearsal_share", "0.5"],
         "it needs 80 and has 1; give more rows"),
        ([*OUT, "--rehearsal", "odd.jsonl", "--rehearsal_share", "1.5"], "rehearsal_share is 1.5; it must be"),
        ([*OUT, "--rehearsal", "odd.jsonl", "--rehearsal_share", "0.7", "--safety", "x", "--safety_share", "0.3"],
         "rehearsal_share 0.7 and safety_share 0.3 leave nothing"),
        ([*OUT, "--safety_share", "0.3"], "safety_share is set without safety"),
        ([*OUT, "--safety", "pairs.jsonl"], "are those of preference pairs"),
        ([*OUT, "--weights", "[1,2]"], "2 weights for 1 file"),
        ([*OUT, "--share_of", "target_tokens"], "share_of is set, but there are neither weights nor"),
        ([*OUT, "--shortage", "less"], "shortage is set, but there are no rehearsal"),
        ([*OUT, "--exact_sizes", "--stratify", "book"], "exact_sizes is set beside stratify"),
        ([*OUT, "--clean.remove", "[nonsense]"], "clean.remove"),
        (["--output", "rows.jsonl"], "output rows.jsonl is a file; name a folder"),
        ([*OUT, "--json", "out/facts.json"], "json names a file in output, where report.json has the same"),
        (["--output", "."], "output . holds something else"),
    ],
)  # fmt: skip
def test_every_refusal_is_one_line_and_nothing_is_written(prepare, arguments, expected):
    save("odd.jsonl", [{"prompt": "Is this asked?", "completion": "No."}])
    save("copy.jsonl", ROWS)
    save("pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(MinituneError) as caught:
        prepare(*arguments)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_what_is_there_stays(prepare):
    prepare(*OUT)
    before = Path("out/train.jsonl").read_bytes()
    for folder, file, expected in (
        ("out", "rows.jsonl", "holds prepared data already; name another folder, or add --overwrite"),
        ("out", "out/train.jsonl", "output out holds out/train.jsonl, which is read"),
    ):
        with pytest.raises(MinituneError, match=expected):
            prepare("--output", folder, *(["--overwrite"] * (file != "rows.jsonl")), files=(file,))
    for option in (
        ["--golden", "out/test.jsonl"],
        ["--evaluation_sets", "out/test.jsonl"],
        ["--evaluation_sets", "out"],
    ):
        with pytest.raises(MinituneError, match=f"output out holds {option[1]}, which is read"):
            prepare(*OUT, "--overwrite", *option)
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(MinituneError, match=r"holds something else \(notes.txt\)"):
        prepare(*OUT, "--overwrite")
    assert Path("out/train.jsonl").read_bytes() == before


def test_a_split_that_would_be_empty_is_an_error_that_says_what_helps(prepare):
    save("rows.jsonl", ROWS[:4])
    with pytest.raises(MinituneError, match=r"would be empty: 4 rows, 4 different questions; .*--exact_sizes"):
        prepare(*OUT)
    code, _ = prepare(*OUT, "--split", "[0.75,0.25,0]", "--exact_sizes")
    assert code == 0 and not Path("out/test.jsonl").exists()


def test_empty_lines_before_a_text_are_no_row_of_it(prepare):
    Path("a.txt").write_text("\n \n\n" + "\n\n".join(f"Paragraph {i} of the text" for i in range(20)))
    _, shown = prepare(*OUT, "--exact_sizes", files=("a.txt",))
    assert "a.txt: 20 rows of training" in shown
    parts = (lines(f"out/{name}.jsonl") for name in ("train", "validation", "test"))
    assert sum(row["text"].count("Paragraph") for part in parts for row in part) == 20


def test_a_field_that_was_renamed_is_told_by_the_names_that_there_are(prepare):
    save("rows.jsonl", [{"question": f"Is {i} even?", "label": "yes" if i % 2 else "no"} for i in range(40)])
    with pytest.raises(
        MinituneError, match=r"no value in the field 'label'; .* for --stratify: it has prompt, completion"
    ):
        prepare(*OUT, "--columns", '{"prompt": "question", "completion": "label"}', "--stratify", "label")


def test_texts_have_no_answer_to_expect(prepare):
    Path("a.txt").write_text("one\n\ntwo\n\nthree\n")
    with pytest.raises(MinituneError, match="a text has no answer to expect"):
        prepare(*OUT, "--golden", "1", files=("a.txt",))
