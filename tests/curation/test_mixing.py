"""Mixtures: amounts by hand, in rows and in target tokens, nothing repeated silently."""

import pytest

from minitune.curation.mixing import check_shares, draw, mixture
from minitune.curation.rows import Row
from minitune.data.formats import Record, RowSource
from minitune.errors import ConfigError, DataError


def rows(name, count, tokens=1):
    records = [Record(f"{name}:{i}", "text", text=f"{name} {i}") for i in range(count)]
    return [Row(record, {"tokens": tokens}, RowSource(record.origin, "training", "text")) for record in records]


def one(row):
    return 1


def tokens(row):
    return row.fields["tokens"]


def sizes(portions):
    return [(portion.role, len(portion.rows), round(portion.share, 4)) for portion in portions]


def test_shares_are_of_the_whole():
    # 80 rows of the task beside 0.2 and 0.1 make 80 / 0.7 = 114.3 in all: 22.9 and 11.4
    extra = [("rehearsal", "g", rows("g", 100), 0.2), ("safety", "s", rows("s", 100), 0.1)]
    found = mixture([("t", rows("t", 80))], None, extra, one, 0)
    assert sizes(found) == [("training", 80, 0.7018), ("rehearsal", 23, 0.2018), ("safety", 11, 0.0965)]
    again = mixture([("t", rows("t", 80))], None, extra, one, 0)
    assert [p.rows for p in again] == [p.rows for p in found]
    assert mixture([("t", rows("t", 80))], None, extra, one, 1)[1].rows != found[1].rows
    assert len({row.origin for row in found[1].rows}) == 23


def test_shares_of_target_tokens_are_not_shares_of_rows():
    # 90 labels of 2 tokens are 180; a fifth of the whole is 45, which is one general row of 40 and not two
    extra = [("rehearsal", "g", rows("g", 10, tokens=40), 0.2)]
    found = mixture([("t", rows("t", 90, tokens=2))], None, extra, tokens, 0)
    assert [(len(p.rows), p.amount) for p in found] == [(90, 180), (1, 40)]


def test_weights_give_the_largest_mixture_that_repeats_nothing():
    # 3 : 1 of 30 and 100 rows: 30 and 10
    found = mixture([("a", rows("a", 30)), ("b", rows("b", 100))], [3, 1], [], one, 0)
    assert sizes(found) == [("training", 30, 0.75), ("training", 10, 0.25)]
    assert [p.available for p in found] == [30, 100]


def test_a_source_that_grows_keeps_most_of_what_was_drawn():
    before = {row.origin for row in draw(rows("g", 100), 30, one, 0, shortage="error", what="g")}
    after = {row.origin for row in draw(rows("g", 110), 30, one, 0, shortage="error", what="g")}
    assert len(before & after) >= 24  # 10 new among 110 push out 30 x 10 / 110 of them, 2.7 on average


def test_too_few_rows_are_an_error_or_said_otherwise():
    task = [("t", rows("t", 80))]

    def extra(count):
        return [("rehearsal", "g", rows("g", count), 0.5)]

    with pytest.raises(DataError, match=r"g for rehearsal_share 0.5: it needs 80 and has 30; .*--shortage"):
        mixture(task, None, extra(30), one, 0)
    assert sizes(mixture(task, None, extra(30), one, 0, "less"))[1] == ("rehearsal", 30, round(30 / 110, 4))
    repeated = mixture(task, None, extra(30), one, 0, "repeat")[1].rows
    assert len(repeated) == 80 and len({row.origin for row in repeated}) == 30  # 30 + 30 + 20
    assert sizes(mixture(task, None, extra(80), one, 0))[1][1] == 80
    with pytest.raises(DataError, match="0.081 is no row"):
        mixture([("t", rows("t", 8))], None, [("rehearsal", "g", rows("g", 5), 0.01)], one, 0)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"rehearsal_share": 0.0}, "rehearsal_share is 0; it must be above 0 and below 1"),
        ({"safety_share": 1.0}, "safety_share is 1; it must be"),
        ({"rehearsal_share": float("nan")}, "rehearsal_share is nan"),
        ({"rehearsal_share": 0.6, "safety_share": 0.4}, "rehearsal_share 0.6 and safety_share 0.4 leave nothing"),
    ],
)
def test_impossible_shares(shares, message):
    with pytest.raises(ConfigError, match=message):
        check_shares(shares)


def test_impossible_weights():
    task = [("a", rows("a", 3)), ("b", rows("b", 3))]
    with pytest.raises(ConfigError, match="1 weight for 2 files"):
        mixture(task, [1], [], one, 0)
    with pytest.raises(ConfigError, match="weight 0 of data source 2"):
        mixture(task, [1, 0], [], one, 0)
