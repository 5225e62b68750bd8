"""The command from seeds to reviewed rows, with a scripted teacher and judge behind a local server."""

import json
import re

import pytest

from minitune import endpoint, synthesize
from minitune.data.formats import read_records
from minitune.endpoint import Reply
from minitune.errors import ConfigError, DataError, EndpointError, MinituneError
from minitune.reporting.ballot import ballot_id
from tests.chat_server import Answer, chat_server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def seeds(tmp_path):
    path = tmp_path / "seeds.jsonl"
    lines = [{"instruction": f"What is {word}?", "output": f"It is {word}."} for word in ("rain", "snow", "wind")]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def shown_first(request):
    """The seed that a request is about: the first example's instruction."""
    return re.search(r"Examples:\n.*?(What is \w+)", request["messages"][0]["content"])[1]


def rows_for(*rows):
    return "\n".join(json.dumps({"instruction": question, "output": answer}) for question, answer in rows)


def teacher(request):
    """Whole rows; of the seed about snow also what each filter is for."""
    seed = shown_first(request)
    if "snow" not in seed:
        return rows_for((f"{seed} made of, in the end?", f"Of {seed[8:]}."), ("Name a colour.", "Red."))
    return rows_for(("What is RAIN?", "Wet."), ("Do harm.", "I'm sorry, but I can't help with that."), ("Odd?", "Um?"))


def run(server, seeds, output, *more):
    arguments = ["--seeds", seeds, "--output", output, "--instruction", "Write.", "--examples=2",
                 "--teacher.endpoint", server.url, "--teacher.model=big", "--teacher.retries=0", *more]  # fmt: skip
    return synthesize.main([str(argument) for argument in arguments])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_made_filtered_and_written_with_their_origin(seeds, tmp_path, capsys):
    out = tmp_path / "out"
    with chat_server(teacher) as server:
        assert run(server, seeds, out, r"--answer_form=regex:[\w ]+\.") == 0
    rows = lines(out / "rows.jsonl")
    assert [(row["instruction"], row["output"]) for row in rows] == [
        ("What is rain made of, in the end?", "Of rain."),
        ("Name a colour.", "Red."),
        ("What is wind made of, in the end?", "Of wind."),
    ]
    made = rows[2]["synthetic"]
    assert made["seed"] == f"{seeds}:3" and made["teacher"] == f"big at {server.url}" and len(made["recipe"]) == 64
    assert [record.unread for record in read_records(out / "rows.jsonl")] == [("synthetic",)] * 3
    rejected = [(row["reason"], row["seed"][-2:], row["instruction"]) for row in lines(out / "rejected.jsonl")]
    assert rejected == [
        ("the question of a seed", ":2", "What is RAIN?"),
        ("the question of another row", ":3", "Name a colour."),
        ("a refusal", ":2", "Do harm."),
        ("not of the form", ":2", "Odd?"),
    ]
    counts = json.loads((out / "counts.json").read_text())
    assert counts["counts"] == {"seeds": 3, "requests": 3, "rows_read": 7, "rows_kept": 3,
                                "rejected": {reason: 1 for reason, *_ in rejected}}  # fmt: skip
    assert counts["recipe"]["teacher"]["model"] == "big" and len(counts["review"]) == 1
    printed = capsys.readouterr().out
    assert "read      7 rows" in printed and "rejected  1  a refusal" in printed and "kept      3 rows in" in printed
    page = (out / "review.html").read_text()
    assert rows[counts["review"][0] - 1]["output"] in page and "src=" not in page


def test_a_list_of_questions_is_answered_one_by_one(seeds, tmp_path):
    def lists(request):
        asked = request["messages"][-1]["content"]
        if "Examples:" not in asked:
            return Answer(f"About {asked}", "length" if asked == "Long?" else "stop")
        return f"Here:\n1. Who likes {shown_first(request)[8:]}?\n2. Long?\n3. Who?\nand why"

    with chat_server(lists) as server:
        assert run(server, seeds, tmp_path / "out", "--reply=numbered_list", "--near_duplicates=null") == 0
    rows = lines(tmp_path / "out/rows.jsonl")
    assert [row["output"] for row in rows] == [f"About Who likes {word}?" for word in ("rain", "snow", "wind")]
    counts = json.loads((tmp_path / "out/counts.json").read_text())["counts"]["rejected"]
    assert counts == {"text before the list": 3, "an item of several lines": 3, "the question of another row": 2,
                      "cut off": 1}  # fmt: skip
    assert len(server.requests) == 3 + 4  # a question that comes again is not answered again


def test_a_judge_scores_what_is_left(seeds, tmp_path):
    def judge(request):
        asked = request["messages"][0]["content"]
        if "Examples:" in asked:
            return teacher(request)
        if "colour" in asked:
            return "I like it. 9 of 10."
        score = 9 if "rain made" in asked else 5
        return f"Fine.\nSCORE correctness: {score}\nSCORE relevance: 8\nSCORE clarity: 7"

    with chat_server(judge) as server:
        options = ["--judge.endpoint", server.url, "--judge.model=wise", "--min_score=7", "--refusals=keep"]
        assert run(server, seeds, tmp_path / "out", *options) == 0
    (row,) = lines(tmp_path / "out/rows.jsonl")
    assert row["instruction"] == "What is rain made of, in the end?" and row["synthetic"]["score"] == (9 + 8 + 7) / 3
    rejected = {row["instruction"]: (row["reason"], row["details"]) for row in lines(tmp_path / "out/rejected.jsonl")}
    low = ("judged below min_score", "correctness 5, relevance 8, clarity 7")  # 20 / 3 < 7
    assert rejected["Odd?"] == rejected["Do harm."] == rejected["What is wind made of, in the end?"] == low
    assert rejected["Name a colour."][0] == "not judged: no score for a criterion"


def test_an_interrupted_run_goes_on_and_gives_the_same(seeds, tmp_path, capsys):
    with chat_server(teacher) as server:
        run(server, seeds, tmp_path / "whole", "--teacher.parallel=1")
        left = [2]

        def failing(request):
            if not left[0]:
                raise RuntimeError
            left[0] -= 1
            return teacher(request)

        server.answer, server.requests[:] = failing, []
        assert run(server, seeds, tmp_path / "out", "--teacher.parallel=1") == 1  # the third has no answer
        assert "1 request had no answer; the same command with --overwrite asks for the rest" in capsys.readouterr().err
        (missing,) = [row for row in lines(tmp_path / "out/rejected.jsonl") if row["reason"] == "the endpoint failed"]
        assert missing["seed"] == f"{seeds}:3" and "broke" in missing["details"]
        server.answer, server.requests[:] = teacher, []
        assert run(server, seeds, tmp_path / "out", "--teacher.parallel=1", "--overwrite") == 0
        assert len(server.requests) == 1
        for name in synthesize.MADE:
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
        server.requests.clear()
        assert run(server, seeds, tmp_path / "out", "--overwrite", "--review_share=1") == 0 and not server.requests
        assert run(server, seeds, tmp_path / "out", "--overwrite", "--teacher.max_new_tokens=9") == 0
        assert len(server.requests) == 3  # another way of asking has replies of its own


def test_nothing_is_asked_again_after_an_interruption(seeds, tmp_path, monkeypatch):
    calls = []

    def respond(conversations):
        calls.append(conversations)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [Reply(teacher({"messages": one}), True) for one in conversations]

    monkeypatch.setattr(synthesize.ResponderOptions, "responder", lambda self: respond)
    arguments = ["--seeds", str(seeds), "--output", str(tmp_path / "out"), "--instruction=Write.", "--examples=2",
                 "--teacher.model", str(tmp_path), "--teacher.batch_size=1"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        synthesize.main(arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["replies.jsonl"]
    assert synthesize.main(arguments) == 0 and len(calls) == 4 and calls[1] == calls[2]
    assert len(lines(tmp_path / "out/rows.jsonl")) == 4


def test_a_teacher_that_is_down_leaves_nothing(seeds, tmp_path):
    with chat_server(lambda request: Answer(status=500)) as server:
        with pytest.raises(EndpointError, match="none of 3 requests had an answer: .*HTTP 500"):
            run(server, seeds, tmp_path / "out", "--teacher.parallel=1")
        server.answer = teacher
        assert run(server, seeds, tmp_path / "out") == 0  # nothing is in the way


def test_a_local_model_is_asked_the_same_way(seeds, tmp_path, tiny_folder):
    folder = tiny_folder(tmp_path / "model", max_position_embeddings=1024)
    arguments = ["--seeds", seeds, "--output", tmp_path / "out", "--instruction", "Write.", "--examples=1",
                 "--teacher.model", folder, "--teacher.max_new_tokens=4"]  # fmt: skip
    with pytest.raises(DataError, match="no row is left"):  # a random model writes no JSON
        synthesize.main([str(argument) for argument in arguments])
    assert len(lines(tmp_path / "out/replies.jsonl")) == 3
    assert {row["reason"] for row in lines(tmp_path / "out/rejected.jsonl")} <= {
        "cut off",
        "not JSON",
        "an empty reply",
    }


def reviewed(out, choices, name="votes.json"):
    """Save votes as the page does."""
    rows, counts = lines(out / "rows.jsonl"), json.loads((out / "counts.json").read_text())
    items = synthesize._review_items(rows, [number - 1 for number in counts["review"]])
    votes = [{"item": f"row-{number}", "choice": choice, "note": ""} for number, choice in choices.items()]
    content = {"ballot": ballot_id(items, synthesize.CHOICES), "votes": votes}
    (out / name).write_text(json.dumps(content))
    return ["--output", str(out), "--review", str(out / name)]


@pytest.fixture
def made(seeds, tmp_path):
    """20 rows, of which half are drawn for review."""

    def many(request):
        seed = shown_first(request)[8:]
        return rows_for(*((f"{seed} {i} {i * i + 17}", f"<b>{i}</b>") for i in range(10)))

    with chat_server(many) as server:
        run(server, seeds, tmp_path / "out", "--per_seed=10", "--review_share=0.5", "--max_seeds=2")
    return tmp_path / "out"


def test_votes_are_applied_and_speak_for_the_unread_rows(made, capsys):
    drawn = json.loads((made / "counts.json").read_text())["review"]
    assert len(drawn) == 10 and "&lt;b&gt;" in (made / "review.html").read_text()
    choices = dict.fromkeys(drawn[:8], "accept") | {drawn[2]: "reject", drawn[5]: "reject"}
    synthesize.main(reviewed(made, choices))
    rows, kept = lines(made / "rows.jsonl"), lines(made / "reviewed.jsonl")
    assert kept == [row for number, row in enumerate(rows, 1) if number not in (drawn[2], drawn[5])]
    found = json.loads((made / "reviewed.json").read_text())
    assert (found["judged"], found["rejected"], found["unread"], found["acceptance"]) == (8, 2, 12, 0.75)
    low, high = found["acceptance_interval"]
    for edge in (low, high):  # Wilson (1927): the shares from which 6 in 8 is 1.96 standard deviations away
        assert abs(edge - 0.75) == pytest.approx(1.959964 * (edge * (1 - edge) / 8) ** 0.5)
    assert low < 0.75 < high and found["unread_to_reject"] == 3
    assert found["unread_to_reject_interval"] == pytest.approx([12 * (1 - high), 12 * (1 - low)])
    printed = capsys.readouterr().out
    assert "accepted  75.0% of 8 judged rows (95% interval 40.9% to 92.9%); 2 of those drawn have no vote" in printed
    assert "unread    12 rows, of which you would reject about 3 (1 to 7)" in printed
    assert "more than a tenth may be bad" in printed
    with pytest.raises(ConfigError, match="reviewed.jsonl is there already; .*--overwrite"):
        synthesize.main(reviewed(made, choices))
    config = synthesize.SynthesizeConfig(
        output=str(made), overwrite=True, seeds="s", instruction="x", teacher=synthesize.ResponderOptions(model="m")
    )
    synthesize.write(config, [], [], {"recipe": {}, "seeds_sha256": ""}, {})
    assert not (made / "reviewed.jsonl").exists()  # it was made of other rows


def test_votes_that_belong_elsewhere_are_refused(made):
    drawn = json.loads((made / "counts.json").read_text())["review"]
    arguments = reviewed(made, dict.fromkeys(drawn, "accept"))
    rows = (made / "rows.jsonl").read_text()
    (made / "rows.jsonl").write_text(rows.replace("<b>", "<i>"))
    with pytest.raises(DataError, match="the texts have changed"):
        synthesize.main(arguments)
    (made / "rows.jsonl").write_text(rows.split("\n")[0])
    with pytest.raises(DataError, match="names no rows of rows.jsonl for review"):
        synthesize.main(arguments)
    (made / "rows.jsonl").write_text(rows)
    with pytest.raises(DataError, match="no votes in it"):
        synthesize.main(reviewed(made, {}))
    undrawn = next(number for number in range(1, 21) if number not in drawn)
    with pytest.raises(DataError, match="is not among"):
        synthesize.main(reviewed(made, {undrawn: "accept"}))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--output o", "seeds is missing"),
        ("--output o --seeds s.jsonl", "instruction is missing"),
        ("--output o --seeds s.jsonl --instruction x", "teacher.model is missing"),
        ("--output o --config synthesis --seeds s.jsonl", "temperature is set, but no model is named"),
        ("--output o --config synthesis --teacher.model m --seeds no.jsonl", "no.jsonl: no such file"),
        ("--output o --review votes.json --seeds s.jsonl", "seeds has no effect on the votes"),
        ("--output o --review votes.json --teacher.model m", "teacher has no effect on the votes"),
        ("T --min_score 5", "min_score is set without judge.model"),
        ("T --rubric r.yaml", "rubric is set without judge.model"),
        ("T --judge.model . --min_score 11", "min_score is 11; the rubric's scale is 1 to 10"),
        ("T --judge.model . --rubric no.yaml", "rubric no.yaml cannot be read"),
        ("T --answer_form regx:a", "answer_form"),
        ("T --review_share 0", "review_share is 0.0"),
        ("T --near_duplicates 2", "near_duplicates is 2.0"),
        ("T --per_seed 0", "per_seed is 0"),
        ("T --max_seeds 0", "max_seeds is 0"),
        ("T --examples 9", "examples is 9, but there are only 3 seeds"),
        ("T --seed -1", "seed is -1"),
        ("T --judge.model no-such-model", "no-such-model: no such file"),
        ("T --reply csv", "reply"),
        ("T --teacher.max_new_tokens 0", "max_new_tokens is 0"),
    ],
)
def test_options_that_cannot_be(seeds, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    sound = f"--output o --seeds {seeds} --instruction x --teacher.model m --teacher.endpoint http://localhost:1/v1"
    with pytest.raises(MinituneError, match=expected):
        synthesize.main(arguments.replace("T", sound, 1).split())
    assert not (tmp_path / "o").exists()
