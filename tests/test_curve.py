"""From rows to a learning curve: nested parts, runs that are not run twice, advice; with a tiny model."""

import json
import math

import pytest

from minitune import curve
from minitune.curation.learning_curve import fit_curve
from minitune.errors import ConfigError, DataError, MinituneError


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("curve") / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 rows whose answers are an echo of the question; 12 more for validation."""
    folder = tmp_path_factory.mktemp("rows")
    for name, numbers in (("rows", range(60)), ("held", range(60, 72))):
        lines = [{"instruction": f"Say {number}", "output": ("even", "odd")[number % 2]} for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def arguments(model, data, output, *more):
    options = ["--model", model, "--data", data / "rows.jsonl", "--validation", data / "held.jsonl", "--output", output,
               "--shares=[0.1,0.3,1]", "--max_length=64", "--batch_size=8", "--accumulation_steps=1",
               "--optimizer.learning_rate=0.01", "--dtype=float32", *more]  # fmt: skip
    return [str(option) for option in options]


def read(path):
    return json.loads(path.read_text())


def test_parts_are_nested_and_drawn_by_the_seed():
    rows = list(range(100))
    parts = [curve.part_of(rows, share, 0) for share in (0.1, 0.3, 1.0)]
    assert [len(part) for part in parts] == [10, 30, 100] and set(parts[0]) < set(parts[1]) < set(parts[2])
    assert parts[1] == sorted(parts[1]) and parts[2] == rows
    assert curve.part_of(rows, 0.1, 1) != parts[0] and curve.part_of([7], 0.1, 0) == [7]


def test_a_curve_of_losses_with_repeats(model, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert curve.main(arguments(model, data, out)) == 0
    once = read(out / "curve.json")
    assert once["sizes"] == [6, 18, 60] and once["measure"] == "loss" and once["validation_rows"] == 12
    for share, (value,) in zip(("0.1", "0.3", "1"), once["values"], strict=True):
        outcome = read(out / f"runs/{share}-0/outcome.json")
        assert value == outcome["best_loss"] and value <= outcome["base_loss"]
        (trained,) = [entry for entry in read(out / f"runs/{share}-0/data.json") if entry["role"] == "training"]
        assert trained["training_examples"] == {"0.1": 6, "0.3": 18, "1": 60}[share]
    assert once["values"][0] > once["values"][2]  # of so small a model, more steps on more rows learn more
    expected = fit_curve(once["sizes"], once["values"], row_variance=once["row_sigma"] ** 2)
    assert once["curve"]["b"] == pytest.approx(expected.b) and once["row_sigma"] > 0
    printed = capsys.readouterr().out
    assert "luck of the validation rows alone" in printed and "120 rows: " in printed
    page = (out / "curve.html").read_text()
    assert "<svg" in page and "http://" not in page and once["advice"][:40] in page

    from minitune.training import run

    trained, train = [], run.train
    monkeypatch.setattr(run, "train", lambda config: trained.append(config.output) or train(config))
    assert curve.main(arguments(model, data, out, "--repeats=2", "--overwrite")) == 0
    twice = read(out / "curve.json")
    assert [name[-5:] for name in trained] == ["0.1-1", "0.3-1", "s/1-1"]  # what was done is not done again
    assert [values[0] for values in twice["values"]] == [value for (value,) in once["values"]]
    assert all(first != second for first, second in twice["values"])
    assert twice["curve"]["degrees_of_freedom"] >= 3


def test_an_interrupted_curve_goes_on(model, data, tmp_path, monkeypatch, capsys):
    from minitune.training import run

    out, calls, train = tmp_path / "out", [], run.train

    def interrupted(config):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(config)

    monkeypatch.setattr(run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        curve.main(arguments(model, data, out))
    assert not (out / "curve.json").exists()
    assert curve.main(arguments(model, data, out)) == 0 and len(calls) == 4
    with pytest.raises(ConfigError, match="curve.json is there already"):
        curve.main(arguments(model, data, out))
    (out / "curve.json").unlink()
    (out / "curve.html").unlink()
    with pytest.raises(ConfigError, match="holds runs with other options or rows"):
        curve.main(arguments(model, data, out, "--batch_size=4"))
    del calls[1:]  # the next run counts as the second, which is interrupted
    with pytest.raises(KeyboardInterrupt):
        curve.main(arguments(model, data, out, "--batch_size=4", "--overwrite"))
    assert not (out / "measured").exists() and not (out / "runs").exists()  # those of other options are gone


def test_a_curve_of_error_rates_of_held_out_rows(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    given = arguments(model, data, out, "--labels=even,odd", "--validation_fraction=0.3")
    place = given.index("--validation")
    del given[place : place + 2]
    assert curve.main(given) == 0
    found = read(out / "curve.json")
    held = sum(len(path.read_text().splitlines()) for path in (out / "data").glob("validation-*"))
    assert found["measure"] == "error rate" and found["validation_rows"] == held
    assert found["sizes"][2] == 60 - held
    for (value,) in found["values"]:
        assert 0 <= value <= 1 and math.isclose(value * held, round(value * held))
    trained = (out / "data/1-0-0.jsonl").read_text().splitlines()
    assert not set(trained) & set((out / "data/validation-0.jsonl").read_text().splitlines())
    assert "only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--shares=[0.5,1]"], "three or more that grow to 1"),
        (["--shares=[0.1,0.3,0.9]"], "three or more that grow to 1"),
        (["--shares=[0.3,0.1,1]"], "three or more that grow to 1"),
        (["--shares=[0,0.1,1]"], "three or more that grow to 1"),
        (["--shares=[0.001,0.002,1]"], "the parts would have 1, 1, 60 rows"),
        (["--repeats=0"], "repeats is 0"),
        (["--labels=even"], "at least two different ones"),
        (["--labels=even,uneven"], "held.jsonl|validation-0.jsonl:2: the answer 'odd' is not one of the labels"),
        (["--max_new_tokens=4"], "max_new_tokens is set without labels"),
        (["--resume"], "resume belongs to a single run"),
        (["--require=best_loss<=1"], "require belongs to a single run"),
        (["--labels=even,odd", "--objective=kto"], "teaches no answers"),
        (["--data=no.jsonl"], "no.jsonl: no such file"),
        (["--share=[0.1]"], "unknown option 'share'"),
    ],
)
def test_options_that_cannot_be(model, data, tmp_path, more, expected):
    with pytest.raises(MinituneError, match=expected):
        curve.main(arguments(model, data, tmp_path / "out", *more))
    assert not (tmp_path / "out/runs").exists()


def test_data_that_has_no_curve(model, data, tmp_path):
    broken, text = tmp_path / "broken.jsonl", tmp_path / "text.txt"
    broken.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    text.write_text("Once upon a time.\n" * 50)
    for path, expected in ((broken, "broken.jsonl:2: "), (text, "a text has no rows to take a part of")):
        with pytest.raises(DataError, match=expected):
            curve.main(arguments(model, data, tmp_path / "out", f"--data={path}"))
