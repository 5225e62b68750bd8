"""Kind "judge": a language model's verdicts on two models' answers, or its scores of one's."""

from dataclasses import dataclass
from typing import Any

from minitune.checkpoint.load import load_tokenizer
from minitune.data.prompts import read_prompts
from minitune.endpoint import Conversation, Reply
from minitune.errors import ConfigError
from minitune.evaluation import blind, judging
from minitune.evaluation.answers import Asked, Duel, duels, model_answers, shown_answer, shown_prompt
from minitune.evaluation.judge import differences
from minitune.evaluation.kinds import progress
from minitune.evaluation.people import Scores, read_people, score_agreement
from minitune.evaluation.rubric import Rubric, read_rubric
from minitune.evaluation.verdicts import Missing, ask_all, read_journal
from minitune.evaluation.wins import Outcome
from minitune.sources import resolve

KEY = "judge"
SIDES = ("tuned", "base")


@dataclass(frozen=True)
class Task(Asked):
    """Prompts to ask or the answers of a blind comparison, the rubric, and people's votes by place, or scores."""

    duels: tuple[Duel, ...] = ()
    rubric: Rubric | None = None
    votes: dict[int, Outcome] | None = None
    people: Scores | None = None

    @property
    def needs_model(self) -> bool:
        """Whether a model has to be loaded to answer."""
        return not self.duels and not self.given


def read(config: Any) -> Task:
    """Return what is judged and by what; errors as `read_rubric`, `read_prompts` and `blind.read_key`."""
    options = config.judge
    check_judge(options)
    rubric = read_rubric(options.rubric)
    if options.key is None:
        asked = Asked.of(read_prompts(resolve(options.prompts))[: config.max_rows], config.answers)
        if options.by == "pairs":
            check_two(config, asked, "judge.by pairs")
        people = _people(options, len(asked.records), SIDES[: 1 + has_two(config, asked)], rubric)
        return Task(asked.records, asked.given, rubric=rubric, people=people)
    key = blind.read_key(options.key)
    votes = None if options.votes is None else key.outcomes(blind.votes_of(options.votes, key))
    people = _people(options, len(key.duels), SIDES, rubric)
    return Task((), duels=key.duels, rubric=rubric, votes=votes, people=people)


def _people(options: Any, rows: int, sides: tuple[str, ...], rubric: Rubric) -> Scores | None:
    return None if options.scores is None else read_people(options.scores, rows, sides, rubric)


def measure(model: Any, tokenizer: Any, task: Asked, config: Any) -> list[Reply]:
    """Return the model's answers."""
    options = {"max_new_tokens": config.max_new_tokens or 256, "batch_size": config.batch_size or 32}
    with progress(len(task.records), "answer", "prompts") as update:
        return model_answers(model, tokenizer, task.records, on_batch=update, **options)


def report(task: Task, found: list | None, base: list | None, config: Any) -> dict[str, Any]:
    """Ask the judge and return what its verdicts come to, with a "problem" where too many are missing."""
    options, pairs = config.judge, list(task.duels)
    ours, theirs = task.both(found, base)
    if not pairs and theirs is not None:
        pairs = duels(task.records, ours, theirs)
    if options.by == "pairs":
        if options.read == "probabilities":
            verdicts = _letters(pairs, task.rubric, config)
        else:
            verdicts = judging.pairwise_verdicts(pairs, task.rubric, asker(config))
        made = judging.pairwise_result(pairs, verdicts, task.votes)
    else:
        made = _scores(task, pairs, ours, config)
    asked = made["judged"] + made["without_verdict"]
    described = {"judge": options.name, "rubric": options.rubric or "default", "by": options.by}
    return described | made | problem_of(made["without_verdict"], asked, options.max_missing)


def _scores(task: Task, pairs: list[Duel], ours: list[Reply] | None, config: Any) -> dict[str, Any]:
    """Return the scores of both models' answers, or of the one's there are."""
    if pairs:
        prompts = [duel.prompt for duel in pairs]
        sides = [[duel.tuned for duel in pairs], [duel.base for duel in pairs]]
    else:
        prompts, sides = [shown_prompt(record) for record in task.records], [ours]
    shown = [shown_answer(one) for side in sides for one in side]
    found = judging.score_answers(prompts * len(sides), shown, task.rubric, asker(config))
    halves = [found[start : start + len(prompts)] for start in range(0, len(found), len(prompts))]
    made = judging.scored_result(*halves, **({"duels": pairs, "votes": task.votes} if pairs else {}))
    if task.people is not None:
        judged = dict(zip(SIDES, halves, strict=False))
        made["score_agreement"] = score_agreement(judged, task.people, task.rubric)
    return made


def _letters(pairs: list[Duel], rubric: Rubric, config: Any) -> list[judging.Both | None]:
    """Return verdicts read from the probabilities of the letters A and B, which are never missing."""
    model, tokenizer = config.judge.load()
    asked = [duel for duel in pairs if not duel.identical]
    answers = [[shown_answer(duel.tuned), shown_answer(duel.base)] for duel in asked]
    size = config.judge.batch_size or 16
    found = differences(model, tokenizer, [duel.prompt for duel in asked], answers, rubric.text, size)
    words = {True: "A", False: "B", None: "TIE"}
    letters = ([words[one[order] > 0 if one[order] else None] for order in ((0, 1), (1, 0))] for one in found)
    return [None if duel.identical else tuple(next(letters)) for duel in pairs]


def asker(config: Any) -> judging.Ask:
    """Return what asks the judge, with its journal and a bar; its name there is its `identity`."""
    options, responder = config.judge, config.judge.responder()

    def ask(questions: list[Conversation]) -> list[Reply | Missing]:
        with progress(len(questions), "judge", "replies") as update:
            return ask_all(
                responder, questions, judge=options.identity, journal=options.journal, at_once=options.at_once,
                on_batch=update,
            )  # fmt: skip

    return ask


def check_judge(options: Any) -> None:
    """Refuse a judge or a journal that is not there or none, before models are asked; errors as their readers'."""
    if options.endpoint is None:
        resolve(options.model)
        if load_tokenizer(options.model, adapter=options.adapters).chat_template is None:
            raise ConfigError(f"{options.model} has no chat template, which a judge needs; use an instruct model")
    if options.journal is not None:
        read_journal(options.journal)


def problem_of(missing: int, asked: int, most: float) -> dict[str, str]:
    """Return {"problem": line} where more than the share `most` of what was asked has no verdict, else nothing."""
    if missing <= most * asked:
        return {}
    share = f"{missing} of {asked} have no verdict, more than judge.max_missing {most:g}: too few to stand on"
    remedy = "take another judge, raise judge.max_new_tokens, or go on with --judge.journal once the endpoint answers"
    return {"problem": f"{share}; {remedy}"}


def has_two(config: Any, asked: Asked) -> bool:
    """Tell whether there is a second model to compare with."""
    return len(asked.given) == 2 if asked.given else config.base is not None or config.adapter is not None


def check_two(config: Any, asked: Asked, what: str) -> None:
    """Raise ConfigError where there is no second model to compare with."""
    if not has_two(config, asked):
        remedy = "give --adapter, --base, or --answers [tuned.jsonl,base.jsonl]"
        raise ConfigError(f"{what} compares two models, and there is one; {remedy}")


def model_names(config: Any) -> dict[str, str]:
    """Return what answers, by side: models, or the files that are given instead."""
    if config.answers is not None:
        files = (config.answers,) if isinstance(config.answers, str) else config.answers
        return dict(zip(SIDES, files, strict=False))
    tuned = config.model if config.adapter is None else f"{config.model} + {config.adapter}"
    return {"tuned": tuned, "base": config.base_name}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the judge and what its verdicts come to."""
    head = f"judge       {found['judge']}, rubric {found['rubric']}, by {found['by']}"
    return [head, *judging.lines(found)]
