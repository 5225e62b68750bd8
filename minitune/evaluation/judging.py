"""What a judge's verdicts come to: two models side by side, asked in both orders, or each answer's scores.

Pairwise, a duel is won by the answer that the judge prefers in both orders; where its verdict turns with the order, or
one order is a tie, the duel is a tie (Zheng et al. 2023, section 3.4). Judges favour a place, so that is reported:

    position bias = duels with the same letter in both orders / duels with a verdict in both,   and which letter

0 is a judge that never minds the order. A duel that lacks a verdict in one order has no outcome: it is counted by its
reason and left out, never half used. Answers that are equal are ties, and nobody is asked. Scored, each answer is
judged alone, one score for each criterion, and the two models are compared on the rows where both have scores.

Single-order judging was rejected, at half the price: what it gains in verdicts it loses to the place.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from minitune.endpoint import Conversation, Reply
from minitune.evaluation.agreement import agreement
from minitune.evaluation.answers import Duel, shown_answer
from minitune.evaluation.bootstrap import mean_of
from minitune.evaluation.people import agreement_lines
from minitune.evaluation.rubric import Rubric
from minitune.evaluation.scores import Measured, report, score_lines
from minitune.evaluation.verdicts import (
    Missing,
    missing_counts,
    pairwise_question,
    read_scores,
    read_verdict,
    score_question,
)
from minitune.evaluation.wins import OUTCOMES, Outcome, Share, count_wins, longer_wins, share_text, win_lines
from minitune.reporting.page import visible

WORDS = ("A", "B", "TIE")
Verdict = str | Missing
Ask = Callable[[list[Conversation]], list[Reply | Missing]]
"""Questions -> the judge's replies, or why there is none: a responder, by way of `verdicts.ask_all`."""
Both = tuple[Verdict, Verdict]  # the tuned model's answer first, then the base's


def pairwise_verdicts(duels: Sequence[Duel], rubric: Rubric, ask: Ask) -> list[Both | None]:
    """Return a judge's verdicts on each duel in both orders; None for one that is not asked, being identical."""
    asked = [duel for duel in duels if not duel.identical]
    questions = []
    for duel in asked:
        ours, theirs = shown_answer(duel.tuned), shown_answer(duel.base)
        questions += [pairwise_question(duel.prompt, *pair, rubric) for pair in ((ours, theirs), (theirs, ours))]
    read = [reply if isinstance(reply, Missing) else read_verdict(reply, WORDS) for reply in ask(questions)]
    pairs = iter(zip(read[::2], read[1::2], strict=True))
    return [None if duel.identical else next(pairs) for duel in duels]


def outcome(both: Both | None) -> Outcome | None:
    """Return who won a duel; None where a verdict is missing. Without verdicts, being identical, it is a tie."""
    if both is None:
        return "tie"
    if any(isinstance(one, Missing) for one in both):
        return None
    return {("A", "B"): "tuned", ("B", "A"): "base"}.get(both, "tie")


def pairwise_result(
    duels: Sequence[Duel], verdicts: Sequence[Both | None], votes: dict[int, Outcome] | None = None
) -> dict[str, Any]:
    """Return what verdicts come to, with the agreement with people's votes (outcome by place) where there are votes."""
    outcomes = [outcome(both) for both in verdicts]
    whole = [both for both, one in zip(verdicts, outcomes, strict=True) if both is not None and one is not None]
    placed = [both[0] for both in whole if both[0] == both[1] != "TIE"]
    missing = [one for both in verdicts if both is not None for one in both]
    asked = sum(both is not None for both in verdicts)
    found: dict[str, Any] = {
        "duels": len(duels), "identical": len(duels) - asked, "judged": len(whole),
        "without_verdict": asked - len(whole), "missing": missing_counts(missing), "details": _details(missing),
        "position_bias": Share(len(placed), len(whole)).numbers(),
        "first_place": Share(placed.count("A"), len(placed)).numbers(),
    }  # fmt: skip
    decided = [(one, duel) for one, duel in zip(outcomes, duels, strict=True) if one is not None]
    found["longer"] = longer_wins(decided).numbers()
    if whole or not asked:  # else there are but ties that nobody judged
        found["wins"] = count_wins([one for one, _ in decided]).numbers()
    found["outcomes"] = outcomes
    return found | _agreement(dict(enumerate(outcomes)), votes)


def _agreement(outcomes: dict[int, Outcome | None], votes: dict[int, Outcome] | None) -> dict[str, Any]:
    """Return the agreement with people's votes, plain and with a tie half way, on duels that both have judged."""
    if votes is None:
        return {}
    common = [place for place in votes if outcomes[place] is not None]
    if not common:
        return {"agreement": None}
    labels = [[one[place] for place in common] for one in (outcomes, votes)]
    found = {weights: asdict(agreement(*labels, OUTCOMES, weights)) for weights in ("none", "linear")}
    return {"agreement": found["none"] | {"linear_kappa": found["linear"]["kappa"],
                                          "linear_kappa_interval": found["linear"]["kappa_interval"]}}  # fmt: skip


def score_answers(
    prompts: Sequence[str], answers: Sequence[str], rubric: Rubric, ask: Ask
) -> list[dict[str, int] | Missing]:
    """Return a judge's scores of each answer, {criterion: score}, or why there are none."""
    replies = ask([score_question(*pair, rubric) for pair in zip(prompts, answers, strict=True)])
    return [reply if isinstance(reply, Missing) else read_scores(reply, rubric) for reply in replies]


def scored_result(
    tuned: Sequence[Any],
    base: Sequence[Any] | None = None,
    duels: Sequence[Duel] = (),
    votes: dict[int, Outcome] | None = None,
) -> dict[str, Any]:
    """Return the mean scores of one model or of two on the same rows, rows without scores left out and counted.

    Of two, the answer with the higher sum of scores is the judge's choice, which is compared with people's votes.
    """
    sides = [tuned] if base is None else [tuned, base]
    rows = [i for i, found in enumerate(zip(*sides, strict=True)) if not any(isinstance(one, Missing) for one in found)]
    every = [one for side in sides for one in side]
    result: dict[str, Any] = {
        "rows": len(tuned), "judged": len(rows), "without_verdict": len(tuned) - len(rows),
        "missing": missing_counts(every), "details": _details(every),
    }  # fmt: skip
    if rows:
        counts = {"rows": len(rows)}
        result |= report(*((counts, _measured([side[i] for i in rows])) for side in sides))
    if base is None:
        return result
    chosen: dict[int, Outcome | None] = dict.fromkeys(range(len(tuned)))
    for i in rows:
        ours, theirs = (sum(side[i].values()) for side in sides)
        chosen[i] = "tie" if ours == theirs else "tuned" if ours > theirs else "base"
    result["longer"] = longer_wins((chosen[i], duels[i]) for i in rows).numbers()
    return result | _agreement(chosen, votes)


def _measured(scores: Sequence[dict[str, int]]) -> dict[str, Measured]:
    """Return the mean of every criterion, and of their mean where there are several."""
    columns = {name: [one[name] for one in scores] for name in scores[0]}
    if len(columns) > 1:
        columns["all criteria"] = [sum(one.values()) / len(one) for one in scores]
    return {name: Measured(mean_of(values)) for name, values in columns.items()}


def _details(found: Sequence[Any]) -> dict[str, str]:
    """Return an example for each reason of a missing verdict."""
    return {one.kind: one.details for one in reversed(found) if isinstance(one, Missing) and one.details}


def lines(found: dict[str, Any]) -> list[str]:
    """Return a result of either kind for a reader."""
    what = "duels" if "duels" in found else "rows"
    result = [f"{what:<12}{found[what]}, judged {found['judged']}, without a verdict {found['without_verdict']}"]
    result[0] += f", identical {found['identical']} (ties)" if "identical" in found else ""
    for kind, count in found["missing"].items():
        example = visible(" ".join(found["details"].get(kind, "").split()))
        result.append(f"{'':<12}no verdict: {kind}, {count}" + (f" (as: {example})" if example else ""))
    if "scores" in found:
        result += score_lines(found)
    if not found["judged"]:
        return result
    if "position_bias" in found:
        result += [
            f"place       {share_text(found['position_bias'])} follow the place, not the answer; "
            f"of these the first place {share_text(found['first_place'])}",
        ]
    if "longer" in found:
        result.append(f"length      the longer answer wins {share_text(found['longer'])}")
    if "wins" in found:
        result += win_lines(found["wins"])
    result += agreement_lines(found.get("score_agreement", {}))
    if "agreement" in found:
        result.append(agreement_text(found["agreement"]))
    return result


def agreement_text(found: dict[str, Any] | None) -> str:
    """Say how far the judge agrees with people."""
    if found is None:
        return "agreement   not known: no duel has both a vote and the judge's outcome"
    if found["kappa"] is None:
        return f"agreement   {found['share']:.1%} of {found['rows']} votes; kappa is not defined, as all are alike"
    if found["kappa_interval"] is None:
        return f"agreement   {found['share']:.1%} of {found['rows']} votes, kappa 0: one side always says the same"
    (low, high), (least, most) = found["kappa_interval"], found["linear_kappa_interval"]
    return (
        f"agreement   {found['share']:.1%} of {found['rows']} votes, Cohen's kappa {found['kappa']:.2f} (95% interval "
        f"{low:.2f} to {high:.2f}), with ties half way {found['linear_kappa']:.2f} ({least:.2f} to {most:.2f})"
    )
