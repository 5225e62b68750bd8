"""Command: make preference pairs. N sampled answers per prompt, scored; the best and the worst of each are a pair.

    python -m minitune.sample --prompts prompts.jsonl --output pairs.jsonl --verifier my_module:score
    python -m minitune.sample ... --reward BASE --reward_adapter runs/reward/adapter
    python -m minitune.sample ... --judge smollm2-135m-instruct --rubric rubric.txt

The pairs are what `python -m minitune.train --objective dpo` reads; with the tuned model the next round begins.
Completion k of prompt i draws from a stream of its own, made of seed, i and k: batches don't change it but where
rounding tips a draw between two tokens. Of completions that are equal but for white space around them one stays;
empty ones go, and those with a NUL, which no row may hold. One that was cut off at max_new_tokens is never the chosen
side: training would end its turn where the model did not, and teach it to stop there.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, DataError, check_counts, check_seed, counted, run_command
from minitune.loading import ModelOptions
from minitune.sampling import Sampling

Scorer = Callable[[list["Asked"], list[list[str]]], list[list[float]]]
"""Prompts and the different texts that answer each -> a score for each text."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling, ModelOptions):
    """What to answer, how to score it, and what becomes of it."""

    prompts: str
    """Rows {"prompt"}, {"messages"} or any that train: .jsonl, .json, .csv, or .txt with a prompt a line."""
    output: str
    """The JSONL file for the rows to train on."""
    output_all: str | None = None
    """Also write every completion, with its score, to this JSONL file."""
    overwrite: bool = False
    """Replace these files where they are there."""
    max_rows: int | None = None
    """Use only the first prompts (default: all)."""
    completions: int = 4
    """Completions of each prompt, at least 2."""
    temperature: float = 1.0
    """1 samples from the model's own distribution; below 1 sharpens it."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    seed: int = 0
    """The same seed gives the same completions; take another one in each round."""
    batch_size: int = 32
    """Completions grown at once, and texts scored at once."""
    verifier: str | None = None
    """Score by a function of yours, package.module:function; it takes (prompt, completion) and returns a number."""
    reward: str | None = None
    """Score by this reward model, or by this base model with reward_adapter on it."""
    reward_adapter: str | None = None
    """With reward: the adapter of a run with --objective reward."""
    judge: str | None = None
    """Score by this model's verdicts on each two completions, in both orders."""
    rubric: str | None = None
    """With judge: a text file that says what makes an answer better (default: correct, to the point, clear)."""
    format: Literal["pairs", "judged"] = "pairs"
    """Write the best and worst completion as a pair (dpo), or each with a label (kto)."""
    min_margin: float = 0.0
    """Format pairs: leave out a pair whose scores differ by no more than this."""
    threshold: float | None = None
    """Format judged: completions that score at least this are good."""
    unfinished: Literal["drop", "reject"] = "drop"
    """Completions cut off at max_new_tokens are left out, or may be the rejected (bad) side."""

    def __post_init__(self):
        """Refuse missing, contradicting and ignored options, and files that would be lost."""
        super().__post_init__()
        if self.temperature == 0:
            raise ConfigError("temperature is 0 (greedy), so all completions of a prompt would be equal; set it above")
        if self.completions < 2:
            raise ConfigError(f"completions is {self.completions}; a pair needs at least 2")
        check_seed(self.seed)
        check_counts(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, max_rows=self.max_rows)
        scorers = [name for name in ("verifier", "reward", "judge") if getattr(self, name) is not None]
        if len(scorers) != 1:
            found = " and ".join(scorers) or "none of them"
            raise ConfigError(f"give one of --verifier, --reward and --judge; found {found}")
        for name, needed in (("reward_adapter", "reward"), ("rubric", "judge")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ConfigError(f"{name} is set without {needed}, which it belongs to; leave it out")
        if not 0 <= self.min_margin < math.inf or (self.min_margin and self.format == "judged"):
            raise ConfigError(f"min_margin is {self.min_margin}; it must be 0 or more, and is for format pairs alone")
        if (self.threshold is not None) != (self.format == "judged"):
            raise ConfigError("threshold belongs to format judged, which needs it; give both or neither")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"threshold is {self.threshold}; it must be a finite number")
        files = [Path(name) for name in (self.output, self.output_all) if name is not None]
        if files[0] in files[1:] or Path(self.prompts) in files:
            raise ConfigError("prompts, output and output_all must be different files")
        for file in files:
            if file.exists() and not self.overwrite:
                raise ConfigError(f"{file} is there already; name another file, or replace it with --overwrite")


@dataclass(frozen=True)
class Asked:
    """A prompt as it stands in the rows that are written (messages, or text to continue), its ids, its file:line."""

    prompt: str | list[dict[str, str]]
    ids: list[int]
    origin: str

    def side(self, text: str) -> Any:
        """Return an answer in the shape of the prompt: a list of one turn, or the text."""
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its text, its length in tokens, whether it ended by itself, and its score."""

    text: str
    tokens: int
    finished: bool
    score: float = math.nan


def main(argv: list[str] | None = None) -> None:
    """Parse the options, sample, score, choose, write."""
    config = parse(SampleConfig, argv, prog="python -m minitune.sample", description=__doc__.split("\n")[0])
    from minitune.data.prompts import read_prompts

    records = read_prompts(config.prompts)[: config.max_rows]
    with _writer(config.output) as write:  # the files are opened before the work, so that it is not in vain
        with _writer(config.output_all) as write_all:
            scorer = load_scorer(config)
            model, tokenizer = config.load()
            asked = [_asked(record, model, tokenizer, config.max_new_tokens) for record in records]
            began = time.monotonic()
            sampled = sample(model, tokenizer, asked, config)
            seconds = time.monotonic() - began
            completions = with_scores(scorer, asked, sampled)
            for one, answers in zip(asked, completions, strict=True):
                for answer in answers:
                    row = {"prompt": one.prompt, "completion": one.side(answer.text), "score": answer.score}
                    write_all(row | {"tokens": answer.tokens, "finished": answer.finished, "source": one.origin})
        tokens = sum(answer.tokens for answers in completions for answer in answers)
        print(f"sampled   {counted(tokens, 'token')} in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
        if config.judge is None:  # a judge's scores are about 0.5 on average by their nature
            print(f"scores    {score_line([[answer.score for answer in answers] for answers in completions])}")
        rows, left_out = choose(asked, completions, config)
        for row in rows:
            write(row)
        print(f"left out  {left_out}")
        if not rows:
            raise DataError(f"no row is left for {config.output}; {left_out}")
    print(f"written   {counted(len(rows), 'row')} to {config.output}")


@contextmanager
def _writer(path: str | None) -> Iterator[Callable[[dict], Any]]:
    """Yield a function that writes a row to a JSONL file, which is there once the block ends; None: it does nothing."""
    from minitune.files import atomic_file

    if path is None:
        yield lambda row: None
        return
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _asked(record: Any, model: Any, tokenizer: Any, max_new_tokens: int) -> Asked:
    """Encode a prompt as training does, or say where one is that cannot be asked."""
    from minitune.decoding import encode_prompt

    chat = record.messages is not None and (record.prompt is None or tokenizer.chat_template is not None)
    prompt = list(record.messages) if chat else record.prompt
    try:
        ids = encode_prompt(tokenizer, prompt, raw=not chat)
    except (ConfigError, DataError) as error:
        raise DataError(f"{record.origin}: {error}") from None
    if len(ids) + max_new_tokens > model.config.longest:
        found = f"{record.origin}: {len(ids)} tokens and {max_new_tokens} new ones, but the model reads at most"
        raise DataError(f"{found} {model.config.longest}; remove the row or lower max_new_tokens")
    return Asked(prompt, ids, record.origin)


def sample(model: Any, tokenizer: Any, asked: Sequence[Asked], config: SampleConfig) -> list[list[Completion]]:
    """Return `config.completions` completions of each prompt, in the order of the prompts."""
    from tqdm import tqdm

    from minitune.decoding import generate_ids

    count = config.completions
    with tqdm(total=len(asked) * count, desc="sample", unit=" completions") as bar:
        answers = generate_ids(
            model, [one.ids for one in asked for _ in range(count)],
            max_new_tokens=config.max_new_tokens, sampling=Sampling.of(config), end_ids=tokenizer.end_ids,
            seed=config.seed, batch_size=config.batch_size, on_batch=bar.update,
        )  # fmt: skip
    completions = [Completion(tokenizer.decode(ids), len(ids), len(ids) < config.max_new_tokens) for ids in answers]
    return [completions[start : start + count] for start in range(0, len(completions), count)]


def load_scorer(config: SampleConfig) -> Scorer:
    """Return the scorer that was asked for; a function or model that cannot score is refused here, before the work."""
    if config.verifier is not None:
        from minitune.evaluation.verifier import load_verifier, verified

        verifier = load_verifier(config.verifier)
        return lambda asked, texts: [
            [verified(verifier, one.origin, one.prompt, text) for text in answers]
            for one, answers in zip(asked, texts, strict=True)
        ]
    shared = {field: getattr(config, field) for field in ("dtype", "device", "backend")}
    scoring = ModelOptions(model=config.reward or config.judge, adapter=config.reward_adapter, **shared)
    if config.reward is not None:
        from minitune.evaluation.reward import score_answers

        score = partial(score_answers, *scoring.load(), batch_size=config.batch_size)
    else:
        from minitune.evaluation.judge import RUBRIC, rank

        rubric = RUBRIC if config.rubric is None else read_rubric(Path(config.rubric))
        score = partial(rank, *scoring.load(), rubric=rubric, batch_size=config.batch_size)
    score([], [])  # refuses a model that cannot
    return lambda asked, texts: score([one.prompt for one in asked], texts)


def read_rubric(path: Path) -> str:
    """Return the text of a rubric; raises ConfigError where there is none."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rubric {path} cannot be read ({error}); give a UTF-8 text file") from None
    if not text:
        raise ConfigError(f"rubric {path} is empty; write what makes an answer better")
    return text


def with_scores(scorer: Scorer, asked: list[Asked], sampled: list[list[Completion]]) -> list[list[Completion]]:
    """Return the completions with their scores; texts that are equal but for white space are scored once."""
    different = [{answer.text.strip(): answer.text for answer in reversed(answers)} for answers in sampled]
    scores = scorer(asked, [list(texts.values()) for texts in different])
    tables = [dict(zip(texts, found, strict=True)) for texts, found in zip(different, scores, strict=True)]
    return [
        [replace(answer, score=table[answer.text.strip()]) for answer in answers]
        for answers, table in zip(sampled, tables, strict=True)
    ]


def score_line(scores: list[list[float]]) -> str:
    """Say what the scores of all completions, of P prompts, are on average, and how sure that is.

    The completions of one prompt are alike, so the interval is that of the prompts' means, by the normal quantile.
    """
    means = [mean(of_prompt) for of_prompt in scores]
    count, prompts = counted(sum(map(len, scores)), "completion"), counted(len(means), "prompt")
    half = NormalDist().inv_cdf(0.975) * stdev(means) / len(means) ** 0.5 if len(means) > 1 else math.nan
    interval = f" (95% interval {mean(means) - half:.4g} to {mean(means) + half:.4g})" if len(means) > 1 else ""
    return f"mean {mean(means):.4g}{interval} of {count} of {prompts}"


def choose(asked: list[Asked], completions: list[list[Completion]], config: SampleConfig) -> tuple[list[dict], str]:
    """Return the rows to train on, and what was left out, in words."""
    rows, counts = [], dict.fromkeys(("empty", "cut off", "duplicate", "too few", "near-tie"), 0)
    for one, answers in zip(asked, completions, strict=True):
        kept = candidates(answers, config.unfinished, counts)
        if config.format == "judged":
            rows += [_judged(one, answer, config.threshold) for answer in kept]
        elif len(kept) < 2 or not any(answer.finished for answer in kept):
            counts["too few"] += 1
        elif (pair := best_and_worst(kept, config.min_margin)) is None:
            counts["near-tie"] += 1
        else:
            rows.append(_pair(one, *pair))
    cut = f"{counts['cut off']} cut off at max_new_tokens {config.max_new_tokens}"
    words = f"completions: {cut}, {counts['empty']} empty or with a NUL, {counts['duplicate']} equal to another"
    if config.format == "judged":
        good = sum(row["label"] for row in rows)
        return rows, f"{words}; of the others {good} are good, {len(rows) - good} bad"
    few = (
        f"{counts['too few']} with too few others ({'one' if config.unfinished == 'reject' else 'two'} must have ended)"
    )
    return rows, f"{words}; prompts: {few}, {counts['near-tie']} without a margin above {config.min_margin:g}"


def candidates(answers: list[Completion], unfinished: str, counts: dict[str, int]) -> list[Completion]:
    """Return the different completions of a prompt that may be part of a row; `counts` takes the others."""
    kept: dict[str, Completion] = {}
    for answer in sorted(answers, key=lambda answer: not answer.finished):  # of equals, one that ended stays
        text = answer.text.strip()
        if not text or "\0" in text:
            counts["empty"] += 1
        elif not answer.finished and unfinished == "drop":
            counts["cut off"] += 1
        elif text in kept:
            counts["duplicate"] += 1
        else:
            kept[text] = answer
    return list(kept.values())


def best_and_worst(kept: list[Completion], min_margin: float) -> tuple[Completion, Completion] | None:
    """Return the best completion that ended and the worst of all; None where their margin is not above `min_margin`."""
    best = max((answer for answer in kept if answer.finished), key=lambda answer: answer.score)
    worst = min(kept, key=lambda answer: answer.score)
    return (best, worst) if best.score - worst.score > min_margin else None


def _pair(one: Asked, best: Completion, worst: Completion) -> dict[str, Any]:
    sides = {"chosen": one.side(best.text), "rejected": one.side(worst.text)}
    scores = {"score_chosen": best.score, "score_rejected": worst.score}
    return {"prompt": one.prompt, **sides, **scores, "source": one.origin}


def _judged(one: Asked, answer: Completion, threshold: float) -> dict[str, Any]:
    label = answer.finished and answer.score >= threshold
    row = {"prompt": one.prompt, "completion": one.side(answer.text), "label": label}
    return row | {"score": answer.score, "source": one.origin}


if __name__ == "__main__":
    run_command(main)
