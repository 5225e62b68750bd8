"""Whether to fine-tune: every path of the sequence, every answer that is none, and no path without an end."""

import itertools

import pytest

from minitune.errors import ConfigError
from minitune.planning.questions import GOALS, QUESTIONS, Answers, checked, decide, from_answers

NEITHER = {"retrieved": "yes", "retrieval_enough": "no"}
DEAR = {"prompt_enough": "yes", "prompt_affordable": "no"}
TRIED = {"goal": "skill", "measured": "yes", "prompted": "yes", "prompt_enough": "no"}
PATHS = [  # answers, the next step, and a word of the advice or its reasons
    ({"goal": "labels", "measured": "no"}, "measure", "test set"),
    ({"goal": "style", "measured": "yes", "prompted": "no"}, "prompt", "score a careful prompt"),
    ({**TRIED, "prompt_enough": "yes", "prompt_affordable": "yes"}, "prompt", "good enough and affordable"),
    ({**TRIED, **DEAR, "facts": "none", "examples": 500}, "fine-tune", "expensive"),
    ({**TRIED, "facts": "changing", "retrieved": "no"}, "retrieval", "passages"),
    ({**TRIED, "facts": "stable", "retrieved": "no"}, "retrieval", "invent"),
    ({**TRIED, "facts": "stable", "retrieved": "yes", "retrieval_enough": "yes"}, "retrieval", "good enough"),
    ({**TRIED, "goal": "facts", "facts": "changing", **NEITHER}, "retrieval", "search"),
    ({**TRIED, "facts": "changing", **NEITHER, "examples": 900}, "fine-tune", "adapters"),
    ({**TRIED, "goal": "facts", "facts": "stable", **NEITHER, "examples": 9000},
     "fine-tune", "many wordings"),
    ({**TRIED, "facts": "none", "examples": 20, "obtainable": "yes"}, "data", "collect"),
    ({**TRIED, "facts": "none", "examples": 1, "obtainable": "no"}, "prompt", "1 example for skill is below"),
    ({**TRIED, "facts": "none", "examples": 300}, "fine-tune", "the slope"),
    ({**TRIED, "goal": "smaller", "facts": "none", "examples": 9000}, "fine-tune", "large model"),
    ({**TRIED, "goal": "preferences", "facts": "none", "examples": 2000}, "fine-tune", "pairs"),
]  # fmt: skip


@pytest.mark.parametrize("answers,step,word", PATHS)
def test_each_path_has_its_verdict_and_reasons(answers, step, word):
    verdict = from_answers(Answers(**answers))
    assert verdict.step == step
    assert word in " ".join((verdict.advice, *verdict.reasons))
    assert verdict.reasons and verdict.measure_first
    assert (verdict.method is not None) == (step == "fine-tune") == (verdict.examples is not None)


@pytest.mark.parametrize("answers", [path[0] for path in PATHS])
def test_only_what_decides_is_asked(answers):
    """Each answer of a path is needed: without its last one there is no verdict."""
    *kept, last = answers
    with pytest.raises(ConfigError, match=f"the answer {last} is missing"):
        from_answers(Answers(**{name: answers[name] for name in kept}))


def test_every_combination_of_answers_ends():
    choices = [question.choices or ("10", "100000") for question in QUESTIONS.values()]
    steps = set()
    for combination in itertools.product(*choices):
        given, asked = dict(zip(QUESTIONS, combination, strict=True)), []

        def ask(question, given=given, asked=asked):
            asked.append(question.name)
            return given[question.name]

        verdict = decide(ask)
        assert len(asked) == len(set(asked))
        assert asked == [name for name in QUESTIONS if name in asked]
        steps.add(verdict.step)
        if verdict.step == "fine-tune":
            assert given["measured"] == given["prompted"] == "yes"
            assert given["facts"] == "none" or given["retrieval_enough"] == "no"
    assert steps == {"measure", "prompt", "retrieval", "data", "fine-tune"}


def test_a_goal_decides_method_and_objective():
    for goal, wanted in GOALS.items():
        facts = (
            {"facts": "stable", "retrieved": "yes", "retrieval_enough": "no"} if goal == "facts" else {"facts": "none"}
        )
        verdict = from_answers(Answers(**{**TRIED, "goal": goal, **facts, "examples": 10**6}))
        assert (verdict.method, verdict.objective, verdict.examples) == (wanted.method, wanted.objective, 10**6)
    assert GOALS["preferences"].objective == "dpo" and GOALS["facts"].method == "full"


@pytest.mark.parametrize(
    "name,given,expected",
    [("measured", True, "yes"), ("measured", False, "no"), ("measured", " Y ", "yes"), ("goal", "LABELS", "labels"),
     ("facts", "ch", "changing"), ("examples", "1,200", 1200), ("examples", 0, 0)],
)  # fmt: skip
def test_answers_are_taken_as_people_write_them(name, given, expected):
    assert checked(QUESTIONS[name], given) == expected


@pytest.mark.parametrize(
    "name,given,message",
    [("measured", "perhaps", "answer yes, no"), ("goal", "s", "answer labels"), ("goal", "", "answer labels"),
     ("goal", "lables", "did you mean 'labels'"), ("examples", -3, "whole number"), ("examples", "many", "whole"),
     ("examples", 1.5, "whole"), ("examples", True, "whole"), ("examples", "9" * 40, "whole"), ("facts", 3, "none")],
)  # fmt: skip
def test_what_is_no_answer_is_refused_in_one_line(name, given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        checked(QUESTIONS[name], given)
    assert "\n" not in str(caught.value)


def test_a_bad_answer_is_refused_though_it_is_not_needed():
    with pytest.raises(ConfigError, match="examples"):
        from_answers(Answers(goal="labels", measured="no", examples="lots"))
