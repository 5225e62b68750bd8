"""The classification case: both sides answer the same rows alike, and answers that differ are no comparison."""

import dataclasses
import json

import pytest

from bench import peers, worker
from bench.cases import CASES, REVIEWS
from bench.measure import disagreement, in_unit

CASE = next(case for case in CASES if case.name == "evaluate-fp32")


class OneRound(Exception):
    pass


class Channel:
    """Ends a side after its first round and keeps what it reported."""

    def wait(self):
        pass

    def report(self, **values):
        self.values = values
        raise OneRound


@pytest.fixture(scope="module")
def cache(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    tiny_folder(folder / "float32")
    rows = [[{"role": "user", "content": f"{'well ' * (n % 5)}made {n}"}] for n in range(REVIEWS)]
    (folder / "reviews.json").write_text(json.dumps(rows))
    return folder


def test_both_sides_give_the_same_answers_to_the_same_rows(cache):
    found = {}
    for name, side in (("ours", worker.our_answers), ("peer", peers.answers)):
        channel = Channel()
        with pytest.raises(OneRound):
            side(CASE, cache, channel)
        found[name] = channel.values | {"threads": 1, "losses": []}
    assert found["ours"]["tokens"] == REVIEWS and len(set(found["ours"]["ids"])) > 1
    assert found["ours"]["ids"] == found["peer"]["ids"]
    assert disagreement(CASE, found) is None
    found["peer"]["ids"] = [*found["peer"]["ids"][:-2], "other", "other"]
    assert disagreement(CASE, found) == "96% of the answers are alike"
    assert disagreement(dataclasses.replace(CASE, dtype="bfloat16"), found) is None
    assert in_unit(CASE, found["ours"], 2.0) == REVIEWS / 2
