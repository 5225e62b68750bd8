"""The page tells nothing of who is who; votes count for the texts that were shown, once each, and none is lost."""

import io
import json
from dataclasses import replace

import pytest

from minitune import evaluate
from minitune.endpoint import Reply
from minitune.errors import ConfigError, DataError
from minitune.evaluation import blind
from minitune.evaluation.answers import Duel
from tests.kernels.proof import mutant


def duel(number: int, tuned: str, base: str) -> Duel:
    return Duel(f"Question {number}?", Reply(tuned, True), Reply(base, True))


DUELS = [duel(i, f"tuned says {i}", f"base says {i}, and more") for i in range(6)] + [duel(6, "same", " same ")]
NAMES = ("runs/secret/adapter", "smollm2")


@pytest.fixture
def key() -> blind.Key:
    return blind.make_key(DUELS, *NAMES, seed=3)


def choices(key: blind.Key, *outcomes: str) -> list[blind.Vote]:
    """Votes on the first pairs for the tuned model, the base, or neither, whichever place they have."""
    found = []
    for number, (outcome, (_, tuned_first)) in enumerate(zip(outcomes, key.order, strict=False), 1):
        choice = "tie" if outcome == "tie" else "a" if (outcome == "tuned") == tuned_first else "b"
        found.append(blind.Vote(f"pair-{number}", choice))
    return found


def save(path, key, votes) -> None:
    content = {"ballot": blind.ballot_id(key.items, blind.CHOICES), "votes": [vars(vote) for vote in votes]}
    path.write_text(json.dumps(content))


def test_the_order_is_drawn_by_the_seed(key):
    assert blind.make_key(DUELS, *NAMES, seed=3) == key
    assert blind.make_key(DUELS, *NAMES, seed=4).order != key.order
    assert sorted(place for place, _ in key.order) == list(range(6)) and key.identical == 1
    many = blind.make_key([duel(i, f"t{i}", f"b{i}") for i in range(1000)], *NAMES).order
    assert 420 < sum(first for _, first in many) < 580  # sides by a fair coin
    assert [place for place, _ in many] != sorted(place for place, _ in many)


def test_the_page_is_the_same_whoever_is_the_tuned_model(key):
    page = blind.blind_page(key)
    swapped = blind.Key(
        NAMES[1], NAMES[0], 99, tuple(Duel(one.prompt, one.base, one.tuned) for one in DUELS),
        tuple((place, not first) for place, first in key.order),
    )  # fmt: skip
    assert blind.blind_page(swapped) == page
    assert not [word for word in ("secret", "smollm2", "seed", "tuned_first", "adapter") if word in page]
    assert "same" not in page.split("<body>")[1].split('class="bar"')[0]  # what is equal is not asked
    assert "http" not in page.split("<body>")[1]


def test_strangers_texts_are_escaped(key):
    nasty = blind.make_key([duel(0, "<script>alert(1)</script>", "\u202eevil\x1b[31m")], *NAMES)
    page = blind.blind_page(nasty)
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "\x1b" not in page and "\u202e" not in page
    lines = []
    blind.vote_in_terminal(nasty, "unused", ask=lambda _: "quit", show=lines.append)
    assert not [line for line in lines if "\x1b" in line or "\u202e" in line]


def test_votes_are_counted_for_whom_they_are(key):
    found = blind.result(key, choices(key, "tuned", "tuned", "base", "tie"))
    assert (found["wins"], found["losses"], found["ties"]) == (2, 1, 2)  # the identical pair is a tie
    assert (found["votes"], found["without_vote"], found["identical"]) == (4, ["pair-5", "pair-6"], 1)
    assert found["win_rate"]["value"] == 3 / 5 and found["decided"]["value"] == 2 / 3
    assert found["longer"]["count"] == 1 and found["longer"]["rows"] == 3  # the base's answers are longer
    voted = [vote.choice for vote in choices(key, "tuned", "tuned", "base")]
    assert found["place_a"]["count"] == voted.count("a") and found["place_a"]["rows"] == 3


def test_sides_mixed_up_are_caught(key, tmp_path):
    wrong = mutant(blind, tmp_path, '(vote.choice == "a") == tuned_first', 'vote.choice == "a"')
    votes = choices(key, *["tuned"] * 6)
    assert wrong.Key(**vars(key)).outcomes(votes) != key.outcomes(votes) == dict.fromkeys(range(6), "tuned")


def test_a_key_is_read_as_it_was_written(key, tmp_path):
    path = tmp_path / "key.json"
    blind.write_key(path, key)
    assert blind.read_key(path) == key


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda content: content["duels"][0]["tuned"].update(text="better"), "not those of its ballot"),
        (lambda content: content["order"][0].__setitem__(1, not content["order"][0][1]), "not those of its ballot"),
        (lambda content: content["order"].append(content["order"][0]), "not those of its ballot"),
        (lambda content: content.pop("duels"), "not the key of a blind comparison"),
        (lambda content: content.update(extra=1), "not the key of a blind comparison"),
        (lambda content: content["duels"][0].update(base="text"), "not the key of a blind comparison"),
    ],
)
def test_a_key_that_was_changed_is_refused(key, tmp_path, change, line):
    path = tmp_path / "key.json"
    blind.write_key(path, key)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=line):
        blind.read_key(path)


def test_all_answers_equal_is_no_comparison():
    with pytest.raises(DataError, match="all 1 pair of answers are equal"):
        blind.make_key(DUELS[-1:], *NAMES)


def test_the_mark_of_a_cut_off_answer_tells_it_apart():
    whole = duel(0, "One two", "One two")
    assert whole.identical and not replace(whole, base=Reply("One two", False)).identical


class Voter:
    """Types these lines; what is left out is typed the next time."""

    def __init__(self, *lines):
        self.lines, self.shown = list(lines), []

    def ask(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def test_the_terminal_keeps_every_vote_and_goes_on(key, tmp_path):
    path = tmp_path / "votes.json"
    first = Voter("A", "nonsense", "", "b", "s", "tie", KeyboardInterrupt())
    votes = blind.vote_in_terminal(key, path, ask=first.ask, show=first.shown.append)
    assert [(vote.item, vote.choice) for vote in votes] == [("pair-1", "a"), ("pair-2", "b"), ("pair-4", "tie")]
    assert blind.votes_of(path, key) == votes
    again = Voter("b", "quit")
    votes = blind.vote_in_terminal(key, path, ask=again.ask, show=again.shown.append)
    assert [vote.item for vote in votes] == ["pair-1", "pair-2", "pair-4", "pair-3"]  # the one that was skipped
    assert any("--- 3 of 6 ---" in line for line in again.shown)
    last = Voter("t", "t")
    assert len(blind.vote_in_terminal(key, path, ask=last.ask, show=last.shown.append)) == 6
    assert blind.vote_in_terminal(key, path, ask=Voter().ask, show=last.shown.append) == blind.votes_of(path, key)


@pytest.fixture
def files(tmp_path):
    """Prompts and two files of answers, as generate writes them."""
    rows = [{"prompt": one.prompt} for one in DUELS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for side in ("tuned", "base"):
        replies = [vars(getattr(one, side)) for one in DUELS]
        answers = [
            row | {"answer": one["text"], "tokens": 3, "finished": True} for row, one in zip(rows, replies, strict=True)
        ]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return tmp_path


def run(*options, code=0) -> None:
    assert evaluate.main([str(option) for option in options]) == code


def make(files, *options) -> None:
    run("--blind.prompts", files / "prompts.jsonl", "--answers", f"[{files}/tuned.jsonl,{files}/base.jsonl]",
        "--blind.key", files / "key.json", *options)  # fmt: skip


def test_from_answers_to_votes_by_the_command(files, capsys, monkeypatch):
    make(files, "--blind.page", files / "vote.html", "--blind.seed", 1)
    printed = capsys.readouterr().out
    assert "6 pairs, 1 identical" in printed and "no votes yet" in printed and "model  " not in printed
    key = blind.read_key(files / "key.json")
    assert "base.jsonl" not in (files / "vote.html").read_text() and key.base.endswith("base.jsonl")
    save(files / "votes.json", key, choices(key, *["tuned"] * 6))
    run("--blind.key", files / "key.json", "--blind.votes", files / "votes.json", "--output", files / "out.json")
    assert "the tuned model wins  (sign test, exact, p = 0.031)" in capsys.readouterr().out
    assert json.loads((files / "out.json").read_text())["blind"]["wins"] == 6
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nquit\n"))
    run("--blind.key", files / "key.json", "--blind.terminal", "--blind.votes", files / "mine.json")
    assert len(blind.votes_of(files / "mine.json", key)) == 1
    assert "5 of 6 pairs have no vote and are left out: pair-2, pair-3, pair-4, ..." in capsys.readouterr().out


def test_what_is_there_is_not_overwritten(files):
    make(files, "--blind.page", files / "vote.html")
    before = (files / "key.json").read_text()
    with pytest.raises(ConfigError, match="key.json is there already"):
        make(files, "--blind.page", files / "other.html")
    assert (files / "key.json").read_text() == before
    with pytest.raises(
        ConfigError, match="vote.html is there already; name another file, replace it with --overwrite$"
    ):
        run("--blind.key", files / "key.json", "--blind.page", files / "vote.html")
    make(files, "--blind.page", files / "vote.html", "--blind.seed", 5, "--overwrite")
    assert (files / "key.json").read_text() != before


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda votes: votes.update(ballot="0" * 16), "votes on ballot 0000000000000000"),
        (lambda votes: votes["votes"].append(votes["votes"][0]), "is the second for 'pair-1'"),
        (lambda votes: votes["votes"][0].update(item="pair-99"), "'pair-99', which is not among the 6 items"),
        (lambda votes: votes["votes"][0].update(choice="both"), "says 'both'; it must be one of a, b, tie"),
        (lambda votes: votes.pop("votes"), "no votes in it"),
    ],
)
def test_votes_that_do_not_fit_are_refused_by_name(files, change, line):
    make(files, "--blind.page", files / "vote.html")
    key = blind.read_key(files / "key.json")
    save(files / "votes.json", key, choices(key, "tuned", "base"))
    content = json.loads((files / "votes.json").read_text())
    change(content)
    (files / "votes.json").write_text(json.dumps(content))
    for options in ((), ("--blind.terminal",)):
        with pytest.raises(DataError, match=line):
            run("--blind.key", files / "key.json", "--blind.votes", files / "votes.json", *options)


@pytest.mark.parametrize(
    "options, line",
    [
        (("--blind.prompts", "p.jsonl"), "blind.prompts needs blind.key"),
        (("--blind.page", "p.html"), "blind.page needs blind.key"),
        (("--blind.key", "k.json"), "blind.key alone does nothing"),
        (("--blind.key", "k.json", "--blind.terminal"), "needs a file to keep the votes in"),
        (("--blind.prompts", "p", "--blind.key", "k", "--blind.votes", "v"), "answers that are only made now"),
        (("--blind.key", "k", "--blind.votes", "v", "--blind.seed", "1"), "draws the order of a new comparison"),
        (("--blind.key", "k", "--blind.votes", "v", "--also", "[a=b]"), "also names more"),
        (("--blind.prompts", "p", "--blind.key", "k", "--blind.page", "./k"), "name a file for each"),
        (("--blind.key", "k", "--blind.votes", "v", "--output", "k", "--overwrite"), "name a file for each"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_together(options, line):
    with pytest.raises(ConfigError, match=line):
        run(*options)


def test_one_model_is_no_comparison(files):
    with pytest.raises(ConfigError, match="blind compares two models, and there is one"):
        run(
            "--blind.prompts",
            files / "prompts.jsonl",
            "--blind.key",
            files / "k.json",
            "--blind.page",
            files / "p.html",
        )


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"answer": "x"}\n', "1 answer to 7 prompts"),
        ('{"prompt": "Question 0?", "answer": 3}\n' * 7, "tuned.jsonl:1: no answer"),
        ('{"prompt": "Question 0?", "answer": "x"}\n' * 7, "tuned.jsonl:2: the answer is to another prompt"),
        ("{broken\n" * 7, "broken JSON"),
        (
            '{"messages": [{"role": "user", "content": "Other?"}], "answer": "x"}\n' * 7,
            "tuned.jsonl:1: .* another prompt",
        ),
    ],
)
def test_answers_that_do_not_fit_the_prompts(files, text, line):
    (files / "tuned.jsonl").write_text(text)
    with pytest.raises(DataError, match=line):
        make(files, "--blind.page", files / "vote.html")
    assert not (files / "key.json").exists()
