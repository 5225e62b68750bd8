"""Kind "blind": two models' answers for people to choose between without names, and what their votes come to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.data.prompts import read_prompts
from minitune.errors import ConfigError, counted
from minitune.evaluation import blind
from minitune.evaluation.answers import Asked, duels
from minitune.evaluation.kinds import judge
from minitune.evaluation.wins import share_text, win_lines
from minitune.files import atomic_file
from minitune.sources import resolve

KEY = "blind"
measure = judge.measure  # the answers, as a judge has them


@dataclass(frozen=True)
class Task(Asked):
    """Prompts that are asked now, or the key of a comparison that was made before."""

    key: blind.Key | None = None

    @property
    def needs_model(self) -> bool:
        """Whether a model has to be loaded."""
        return self.key is None and not self.given


def read(config: Any) -> Task:
    """Return the prompts or the key, the votes read once to find what is wrong with them."""
    options = config.blind
    for path in (options.page, *((options.key, options.votes) if options.prompts else ())):
        if path is not None and Path(path).exists() and not config.overwrite:
            going_on = ", or leave out blind.prompts to go on with the comparison that is there" * bool(options.prompts)
            raise ConfigError(f"{path} is there already; name another file, replace it with --overwrite{going_on}")
    if options.prompts is None:
        key = blind.read_key(options.key)
        if options.votes is not None and (not options.terminal or Path(options.votes).exists()):
            blind.votes_of(options.votes, key)
        return Task((), key=key)
    asked = Asked.of(read_prompts(resolve(options.prompts))[: config.max_rows], config.answers)
    judge.check_two(config, asked, "blind")
    return Task(asked.records, asked.given)


def report(task: Task, found: list | None, base: list | None, config: Any) -> dict[str, Any]:
    """Write key and page, ask in the terminal, count the votes; as asked for."""
    options, key = config.blind, task.key
    if key is None:
        pairs = duels(task.records, *task.both(found, base))
        key = blind.make_key(pairs, **judge.model_names(config), seed=options.seed or 0)
        blind.write_key(options.key, key)
        if options.votes is not None:
            Path(options.votes).unlink(missing_ok=True)  # of another comparison, to be replaced
    if options.page is not None:
        with atomic_file(options.page) as path:
            path.write_text(blind.blind_page(key), encoding="utf-8")
    made = {"key": options.key, "page": options.page, "pairs": len(key.order), "identical": key.identical}
    votes = blind.vote_in_terminal(key, options.votes) if options.terminal else ()
    if options.votes is not None and not options.terminal:
        votes = blind.votes_of(options.votes, key)
    return made | (blind.result(key, votes) if votes else {"votes": 0})


def lines(found: dict[str, Any]) -> list[str]:
    """Return the count of votes and what they come to."""
    result = [
        f"{'blind':<12}{counted(found['pairs'], 'pair')}, {found['identical']} identical (ties); key {found['key']}"
    ]
    if found["page"]:
        result.append(f"{'':<12}vote on {found['page']}, then: --blind.key {found['key']} --blind.votes votes.json")
    if not found["votes"]:
        return [*result, f"{'':<12}no votes yet"]
    if found["without_vote"]:
        left = found["without_vote"]
        named = ", ".join([*left[:3], *["..."] * (len(left) > 3)])
        result.append(f"{'':<12}{len(left)} of {found['pairs']} pairs have no vote and are left out: {named}")
    return [
        *result,
        f"{'tuned':<12}{found['tuned']}",
        f"{'base':<12}{found['base']}",
        *win_lines(found),
        f"place       {share_text(found['place_a'])} of the decided votes take answer A",
        f"length      the longer answer wins {share_text(found['longer'])}",
    ]
