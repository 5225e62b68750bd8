"""Whether to fine-tune at all: a few questions, asked in an order in which the first "not yet" decides.

The sequence is the field's: measure, then prompt, then retrieval, then fine-tune, since each step is cheaper, quicker
to change and easier to undo than the next. Fine-tuning teaches a form, a skill or a taste well. Facts it teaches badly:
new ones are learned slowly and bring made-up ones along (Gekhman et al. 2024), and yesterday's are not unlearned. A
weighted score over all answers was rejected: many examples would outvote the missing measurement, without which nobody
will know whether the training helped.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from minitune.errors import ConfigError, counted, nearest


@dataclass(frozen=True)
class Question:
    """What is asked: the answer's name, the text, and what may be answered (empty: a whole number of 0 or more)."""

    name: str
    text: str
    choices: tuple[str, ...] = ("yes", "no")


@dataclass(frozen=True)
class Goal:
    """What a fine-tune for a goal takes: below `least` examples it is not worth a try, `enough` is what to aim for.

    The numbers are orders of magnitude from the field's guides; a learning curve on one's own data replaces them.
    """

    least: int
    enough: int
    first: str
    """What to measure."""
    objective: str = "sft"
    method: str = "lora"


GOALS = {
    "labels": Goal(50, 500, "macro-F1 and the confusion matrix on the test set, of the base with its best prompt"),
    "format": Goal(50, 300, "how often the output has the form (format compliance), of the base with its best prompt"),
    "style": Goal(100, 500, "a blind comparison of 50 answers or more with those of the base and its best prompt"),
    "skill": Goal(200, 2000, "the task's own metric on the test set, of the base with its best prompt, and perplexity "
                  "on general text, to see what is forgotten"),
    "smaller": Goal(500, 5000, "the large model's score and the small one's with the same prompt: the gap to close"),
    "preferences": Goal(500, 2000, "the win rate over the base in a blind comparison", "dpo"),
    "facts": Goal(500, 5000, "questions on the facts in words that the training text does not use, and on other "
                  "facts, to see what is made up", "sft", "full"),
}  # fmt: skip

_TEXTS = {
    "goal": ("What is to change: labels (classify, extract), format (of the output), style (tone, role), skill (a task "
             "it does badly), smaller (a small model in place of a large one), preferences (which of two answers is "
             "better) or facts (what it knows)?", tuple(GOALS)),
    "measured": ("Is there a test set with a metric that tells good from bad?",),
    "prompted": ("Has a careful prompt, with a few examples in it, been scored on that set?",),
    "prompt_enough": ("Is the score of the prompt good enough?",),
    "prompt_affordable": ("Is that prompt quick and cheap enough for every request?",),
    "facts": ("Do the answers rest on facts that the model lacks: none, stable (a closed body of text) or changing "
              "(updated, to be cited, or not for everyone's eyes)?", ("none", "stable", "changing")),
    "retrieved": ("Has retrieval (the right passages put into the prompt) been scored on that set?",),
    "retrieval_enough": ("Is the score with retrieval good enough?",),
    "examples": ("How many checked examples are there to train on?", ()),
    "obtainable": ("Could there soon be several times as many?",),
}  # fmt: skip
QUESTIONS = {name: Question(name, *text) for name, text in _TEXTS.items()}
Ask = Callable[[Question], Any]
Given = str | int | bool | None


@dataclass(frozen=True)
class Answers:
    """The answers to `QUESTIONS`, by name; None where one is not given."""

    goal: Given = None
    """labels, format, style, skill, smaller, preferences or facts."""
    measured: Given = None
    """Whether there is a test set with a metric: yes or no."""
    prompted: Given = None
    """Whether a prompt with examples in it has been scored."""
    prompt_enough: Given = None
    """Whether its score is good enough."""
    prompt_affordable: Given = None
    """Whether it is quick and cheap enough."""
    facts: Given = None
    """What the answers rest on that the model lacks: none, stable or changing."""
    retrieved: Given = None
    """Whether retrieval has been scored."""
    retrieval_enough: Given = None
    """Whether its score is good enough."""
    examples: Given = None
    """How many checked examples there are."""
    obtainable: Given = None
    """Whether there could be several times as many."""


@dataclass(frozen=True)
class Verdict:
    """What to do next; the last three are None where that is not to fine-tune."""

    step: str
    """measure, prompt, retrieval, data or fine-tune."""
    advice: str
    reasons: tuple[str, ...]
    measure_first: str
    method: str | None = None
    objective: str | None = None
    examples: int | None = None
    """How many to aim for."""


def checked(question: Question, given: Any) -> str | int:
    """Return an answer in its proper form, from the first letters of a choice too; ConfigError for what is none."""
    if not question.choices:
        text = str(given).strip().replace(",", "")
        if isinstance(given, bool) or not (text.isascii() and text.isdigit()) or len(text) > 12:
            raise ConfigError(f"{question.name} is {str(given)!a}; it must be a whole number of 0 or more")
        return int(text)
    text = ("yes" if given else "no") if isinstance(given, bool) else str(given)  # YAML reads a bare no as false
    text = text.strip().lower()
    begun = [choice for choice in question.choices if text and choice.startswith(text)]
    if text in question.choices or len(begun) == 1:
        return text if text in question.choices else begun[0]
    choices = ", ".join(question.choices)
    raise ConfigError(f"{question.name} is {str(given)!a}; answer {choices}{nearest(text, question.choices)}")


def from_answers(answers: Answers) -> Verdict:
    """Return the verdict; answers that it does not need may be missing.

    ConfigError for a bad answer, needed or not, or the first one that is missing.
    """
    given = {name: value for name, value in asdict(answers).items() if value is not None}
    for name, value in given.items():
        checked(QUESTIONS[name], value)

    def ask(question: Question) -> Any:
        if question.name not in given:
            raise ConfigError(f"the answer {question.name} is missing: {question.text}")
        return given[question.name]

    return decide(ask)


def decide(ask: Ask) -> Verdict:
    """Ask what has to be known, one question after the other, and return the verdict.

    Args:
        ask: gets a question and returns its answer, which is checked here.
    """

    def answer(name: str) -> Any:
        return checked(QUESTIONS[name], ask(QUESTIONS[name]))

    goal = answer("goal")
    if answer("measured") == "no":
        return Verdict(
            "measure", "Don't fine-tune yet: make a test set of 50 to 200 cases and a metric.",
            ("without a measure nobody can tell whether a prompt, retrieval or training made anything better",
             "the test set serves all later steps, and none of it may be trained on"),
            GOALS[goal].first,
        )  # fmt: skip
    early = _prompt(answer, goal) or _retrieval(answer, goal)
    return early or _training(answer, goal)


def _prompt(answer: Callable[[str], Any], goal: str) -> Verdict | None:
    """Return the verdict where a prompt is the next step or the last one needed."""
    if answer("prompted") == "no":
        return Verdict(
            "prompt", "Don't fine-tune yet: score a careful prompt with 3 to 10 examples in it first.",
            ("a prompt takes hours where training takes days, and is changed in a minute",
             "its score is what a fine-tune has to beat; without it no gain can be claimed"),
            GOALS[goal].first,
        )  # fmt: skip
    if answer("prompt_enough") == "yes" and answer("prompt_affordable") == "yes":
        return Verdict(
            "prompt", "Don't fine-tune: the prompt is good enough and affordable.",
            ("a tuned model has to be trained again for each new base; a prompt moves with you",
             "what a model knew before, training may take away"),
            "the prompt's score again after each change of the model or the data",
        )  # fmt: skip
    return None


def _retrieval(answer: Callable[[str], Any], goal: str) -> Verdict | None:
    """Return the verdict where retrieval is the next step or the last one needed."""
    facts = answer("facts")
    if facts == "none":
        return None
    why = (
        "facts that change would need a new training each time, and training does not say where an answer comes from"
        if facts == "changing"
        else "facts are learned slowly by training, and it makes the model readier to invent others"
    )
    if answer("retrieved") == "no":
        return Verdict(
            "retrieval", "Don't fine-tune yet: put the right passages into the prompt and score that.",
            (why, "retrieval is corrected by correcting a document"),
            "how often the right passage is found, apart from how good the answer is",
        )  # fmt: skip
    if answer("retrieval_enough") == "yes":
        return Verdict(
            "retrieval", "Don't fine-tune: retrieval is good enough.", (why,),
            "the share of questions whose passage is found, again as the documents change",
        )  # fmt: skip
    if goal == "facts" and facts == "changing":
        return Verdict(
            "retrieval", "Don't fine-tune for these facts: make retrieval better.",
            (why, "what fails is mostly the search: look at the passages of the wrong answers first"),
            "of the wrong answers, how many had the right passage in their prompt",
        )  # fmt: skip
    return None


def _training(answer: Callable[[str], Any], goal: str) -> Verdict:
    """Return the verdict where only training is left: with the data there is, or after more is collected."""
    wanted, count = GOALS[goal], answer("examples")
    if count < wanted.least:
        more = answer("obtainable") == "yes"
        advice = f"Don't fine-tune yet: collect examples, {wanted.least:,} at least; {wanted.enough:,} is a good aim."
        if not more:
            advice = (
                "Don't fine-tune: there is too little to learn from. Put the best examples into the prompt instead."
            )
        return Verdict(
            "data" if more else "prompt", advice,
            (f"{counted(count, 'example')} for {goal} {'is' if count == 1 else 'are'} below {wanted.least:,}, from "
             "where a gain is usual; with fewer a model mostly learns these by heart",),
            wanted.first,
        )  # fmt: skip
    reasons = ["a prompt was measured, and is not enough or too expensive"]
    if goal == "facts":
        reasons.append("adapters take up new facts badly: train all weights, on each fact in many wordings, and keep "
                       "retrieval beside it where there is any")  # fmt: skip
    if goal == "smaller":
        reasons.append("let the large model write the training answers, and filter them by the metric")
    if goal == "preferences":
        reasons.append("pairs teach what demonstrations cannot: what not to do; start from a model tuned by examples")
    if wanted.method == "lora":
        reasons.append("adapters of all linear layers come close to full fine-tuning at this size of data, forget less "
                       "and take a fraction of its memory; qlora where even that does not fit")  # fmt: skip
    if count < wanted.enough:
        reasons.append(f"{count:,} examples are enough for a try; train on a third and on all of them, and the slope "
                       f"tells whether {wanted.enough:,} would pay")  # fmt: skip
    return Verdict("fine-tune", "Fine-tune.", tuple(reasons), wanted.first, wanted.method, wanted.objective,
                   max(count, wanted.enough))  # fmt: skip
