"""From a config to a finished run folder: load, choose what trains, fit, export, report.

    config.yaml       every option as it was resolved; `--resume` reads it
    environment.json  versions, processor, threads, dtype
    data.json         files with sha256 and counts
    metrics.jsonl     one line a step and an evaluation; tensorboard/ holds the same
    checkpoints/      the last states and the best weights
    adapter/ | model/ the result: a PEFT adapter, or a Hugging Face folder
    facts.json        what was known before the first step, of the data and of general text
    rows.json         the losses of each validation row, before training and at the best step
    outcome.json      how the run ended; a run without it was killed, or still goes on
    report.md, report.html, loss.png

What can fail does so before anything is written or deleted: data first, then the model, then the folder.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitune.checkpoint.adapter import load_adapter, save_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import has_tokenizer, load_model, load_tokenizer
from minitune.data.corpus import Corpus, Encoding, Stream, load_corpus
from minitune.data.preferences import item_ids
from minitune.device import choose_device, choose_dtype
from minitune.errors import ConfigError, counted
from minitune.files import sole_writer
from minitune.model.lora import adapter_disabled, add_lora, quantized_weights
from minitune.model.trainable import (
    freeze_below,
    train_all,
    train_last_layers,
    train_matching,
    train_whole,
    trainable_parameters,
)
from minitune.model.transformer import Transformer, add_score_head
from minitune.model.vocabulary import add_rows, train_rows
from minitune.ops.backend import set_backend
from minitune.reporting.folder import check_folder, environment
from minitune.reporting.journal import Journal
from minitune.training import state
from minitune.training.config import ADAPTER_METHODS, TrainConfig
from minitune.training.evaluate import answer_samples, sample_prompts
from minitune.training.loop import Job, StopSignal
from minitune.training.objectives import Objective, supervised
from minitune.training.optimizer import Optimizer
from minitune.training.outcome import Account, TrainResult
from minitune.training.penalty import Penalty, build_penalty
from minitune.training.preference import preference_objective, undecided_loss
from minitune.training.reference import with_reference

FEW_STEPS = 10  # a rate that warms up and decays within fewer has hardly moved anything


def train(config: TrainConfig) -> TrainResult:
    """Run training as `config` says; when a signal stops it, the state is saved and `status` is "stopped".

    Raises:
        ConfigError, DataError, CheckpointError: the input's fault, before anything is changed.
        TrainingError: the run cannot go on; its checkpoints stay.
    """
    config = config.resolved()
    account = Account(config)
    folder = Path(config.output)
    check_folder(folder, resume=config.resume, overwrite=config.overwrite)
    device, dtype = _set_up(config)
    known = load_tokenizer(config.model, adapter=config.adapter)
    tokenizer = known.with_tokens(_names(config.new_tokens))
    stream = _load_data(config, tokenizer)
    corpus = stream.corpus
    model = _load_model(config, dtype, device)
    _check_lengths(corpus, model.config.longest)
    base = state.base_fingerprint(model)
    torch.manual_seed(config.seed)
    parameters = choose_parameters(model, config, range(known.vocab_size, tokenizer.vocab_size))
    tokenizer.check_fits(model.config.vocab_size)
    stream = _with_reference(model, stream, config, base)
    ratio = config.lora.plus_ratio or 1.0
    penalty = _penalty(model, parameters, config, tokenizer, base, stream.pad_id)
    optimizer = Optimizer(parameters, config.optimizer, ratio, fused_backward=config.fused_backward)
    matters = state.fingerprint(config, corpus.files, base, str(dtype))
    objective, guessing = _objective(config, model)
    total = config.max_steps * config.accumulation_steps if config.max_steps else stream.count(config.epochs)
    with sole_writer(folder):
        check_folder(folder, resume=config.resume, overwrite=config.overwrite)  # again: another may have begun there
        progress = _resume(folder, parameters, optimizer, matters) if config.resume else state.Progress()
        account.begin(model, tokenizer, corpus, guessing, environment(device, dtype))
        steps, evaluated = -(-total // config.accumulation_steps), [e["step"] for e in progress.evaluations]
        with StopSignal() as stop, Journal(folder, steps, progress.step, evaluated) as journal:
            job = Job(
                config=config,
                model=model,
                parameters=parameters,
                optimizer=optimizer,
                objective=objective,
                stream=stream.batches,
                total_batches=total,
                validation=stream.validation if corpus.validation else None,
                sample=_sampler(model, tokenizer, corpus, config),
                checkpoints=folder / "checkpoints",
                fingerprint=matters,
                progress=progress,
                journal=journal,
                guessing=guessing,
                penalty=penalty,
            )
            _announce(job, corpus, range(known.vocab_size, tokenizer.vocab_size))
            status = account.fit(job, stop)
        result = None if status == "stopped" else _export(job, tokenizer, folder)
        return account.close(job, status, result, tokenizer, stop.number)


def _set_up(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Set threads and backend; return where and in what the run computes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.backend != "auto":
        set_backend(config.backend)
    device = choose_device(config.device)
    if config.optimizer.paged and device.type == "cpu":
        raise ConfigError("optimizer.paged moves moments off a GPU; on a CPU they are there already, leave it out")
    return device, choose_dtype(config.dtype, device)


def _load_data(config: TrainConfig, tokenizer: Any) -> Stream:
    """Return the batches of a resolved config; padding is masked by position, so any id can fill it."""
    corpus = load_corpus(
        config.data,
        config.validation or (),
        tokenizer,
        Encoding(config.max_length, config.truncate, config.train_on),
        held_out=config.validation_fraction or 0.0,
        seed=config.seed,
        kind={"sft": "examples", "kto": "judged"}.get(config.objective, "pairs"),
    )
    pad_id = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
    return Stream(corpus, config.batch_size, config.max_length, config.packing, config.seed, pad_id)


def _load_model(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Return the base, quantised where the method says so."""
    quantize = config.quantization.config() if config.method == "qlora" else None
    model = load_model(config.model, dtype=dtype, device=device, quantize=quantize)
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def _sampler(model: Transformer, tokenizer: Any, corpus: Corpus, config: TrainConfig) -> Callable[[], list]:
    """Return what answers the sample prompts; a reward model has no answers."""
    if config.objective == "reward":
        return list
    length = config.evaluation.sample_tokens
    asked = [item.documents[0] for item in corpus.validation]
    prompts = sample_prompts(asked, config.evaluation.samples, model.config.longest - length)
    return lambda: answer_samples(model, tokenizer, prompts, length)


def choose_parameters(model: Transformer, config: TrainConfig, new_ids: Sequence[int] = ()) -> dict[str, nn.Parameter]:
    """Make the method's parameters trainable, add adapters where it has them; returns them by name.

    `new_ids` are those of tokens that the model has no rows for yet.

    Raises ConfigError where the base is stored in 4 bits, which have no gradient, and the method is not qlora.
    """
    reward = config.objective == "reward"
    if model.config.reward and not reward:
        raise ConfigError(f"{config.model} is a reward model; objective {config.objective} needs a language model")
    if config.method != "qlora" and quantized_weights(model):
        raise ConfigError(f"{config.model} is stored in 4 bits, which method {config.method} cannot train; use qlora")
    if reward and not model.config.reward and config.adapter is None:
        add_score_head(model, config.seed)
    if config.method == "full":
        train_all(model)
    elif config.method == "last_layers":
        train_last_layers(model, config.last_layers)
    elif config.method == "pattern":
        train_matching(model, config.pattern)
    elif config.adapter is None:
        add_lora(model, config.lora.adapter(), seed=config.seed, first_layer=config.freeze_layers or 0)
        train_whole(model, _names(config.lora.modules_to_save))
    else:
        load_adapter(model, config.adapter, config.model)
    if config.freeze_layers is not None:
        freeze_below(model, config.freeze_layers)
    if new_ids:
        add_rows(model, new_ids, seed=config.seed)
        if config.method != "full" or config.freeze_layers is not None:
            train_rows(model, new_ids)
    if model.config.reward != reward:
        kind = "a reward model's" if model.config.reward else "a language model's"
        raise ConfigError(f"{config.adapter} is {kind} adapter, not one for objective {config.objective}; leave it out")
    if reward:
        model.score.requires_grad_(True)
    return trainable_parameters(model)


def _names(names: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """Return an option's names, of which one may stand alone."""
    return (names,) if isinstance(names, str) else names or ()


def _objective(config: TrainConfig, model: Transformer) -> tuple[Objective, float]:
    """Return what is minimised, and the loss of a model that knows nothing."""
    if config.objective == "sft":
        return supervised, math.log(model.config.vocab_size)
    return preference_objective(config.objective, config.preference), undecided_loss(
        config.objective, config.preference, model.config.vocab_size
    )


def _with_reference(model: Transformer, stream: Stream, config: TrainConfig, base: str) -> Stream:
    """Return the stream with the reference's log-probabilities, which are the model's as it is, a fresh adapter off.

    It is returned as it is where they are not made before training.
    """
    if not config.precomputes:
        return stream
    fresh = config.method in ADAPTER_METHODS and config.adapter is None
    base = _start(model, config, base)
    with adapter_disabled(model) if fresh else contextlib.nullcontext():
        corpus, place = with_reference(
            model, stream.corpus, base, batch_size=config.batch_size, pad_id=stream.pad_id,
            path=config.preference.reference_cache,
        )  # fmt: skip
    _note(f"reference log-probabilities: {place}")
    return dataclasses.replace(stream, corpus=corpus)


def _start(model: Transformer, config: TrainConfig, base: str) -> str:
    """Return the fingerprint of all that the run starts from: a loaded adapter and new rows are a part of it."""
    return state.base_fingerprint(model) if config.adapter is not None or config.new_tokens else base


def _penalty(
    model: Transformer, parameters: dict, config: TrainConfig, tokenizer: Any, base: str, pad_id: int
) -> Penalty | None:
    """Return the price on leaving the start, before a resumed run leaves it."""
    if config.penalty.kind is None:
        return None
    start = _start(model, config, base)
    penalty, said = build_penalty(model, parameters, config.penalty, tokenizer, start, pad_id)
    _note(said)
    return penalty


def _check_lengths(corpus: Corpus, positions: int) -> None:
    """Refuse an example with more tokens than the model has positions; packed rows restart at 0 and may be longer."""
    items = [*corpus.validation, *(item for part, _ in corpus.training for item in part)]
    longest = max((document for item in items for document in item.scored), key=lambda document: len(document.ids))
    if len(longest.ids) > positions:
        raise ConfigError(
            f"{longest.origin} has {len(longest.ids)} tokens, but the model reads at most {positions}; "
            f"set max_length to {positions} or less"
        )


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _resume(folder: Path, parameters: dict, optimizer: Optimizer, matters: dict) -> state.Progress:
    """Restore the last sound checkpoint; a run killed before its first one begins again."""
    found = state.latest_checkpoint(folder / "checkpoints", _note)
    if found is None:
        _note(f"{folder} has no complete checkpoint yet; beginning from step 0")
        return state.Progress()
    checkpoint, saved = found
    state.check_fingerprint(saved["fingerprint"], matters, checkpoint)
    state.restore(checkpoint, parameters, optimizer)
    _note(f"resumed from {checkpoint}")
    return state.Progress(**saved["progress"])


def _warn_of_unseen(job: Job, corpus: Corpus, ids: range) -> None:
    """Name new tokens that no training row has, which nothing will train."""
    names = _names(job.config.new_tokens)
    seen = {token for items, _ in corpus.training for item in items for part in item_ids(item) for token in part}
    if unseen := [repr(name) for name, token in zip(names, ids, strict=True) if token not in seen]:
        job.journal.say(f"no training row has {', '.join(unseen)}: a new token that nothing trains; is it misspelt?")


def _announce(job: Job, corpus: Corpus, new_ids: range) -> None:
    """Say what is about to be trained on what; `new_ids` are those of tokens that are added."""
    trained = sum(p.numel() // len(p) * len(getattr(p, "trained_rows", p)) for p in job.parameters.values())
    everything = sum(p.numel() for p in job.model.parameters())
    everything += sum(weight.shape.numel() for weight in quantized_weights(job.model).values())
    rows = sum(len(examples) for examples, _ in corpus.training)
    job.journal.say(
        f"{job.config.method}: {trained:,} of {everything:,} parameters, {rows:,} training and "
        f"{counted(len(corpus.validation), 'validation example')}, {counted(job.total_steps, 'step')}"
    )
    if leaked := corpus.leaked():
        found = counted(leaked, "validation example")
        job.journal.say(f"{found} stood among the training examples too: the loss on them proves nothing")
    if job.total_steps < FEW_STEPS:
        more = "max_steps is that low" if job.config.max_steps else "more epochs or fewer accumulation_steps give more"
        job.journal.say(f"only {counted(job.total_steps, 'step')}, too few to learn much: {more}")
    if not corpus.validation:
        job.journal.say("no validation rows: over-fitting will not be seen")
    _warn_of_unseen(job, corpus, new_ids)


def _export(job: Job, tokenizer: Any, folder: Path) -> Path:
    """Write the best weights where there was validation, else the last, in the ecosystem's format."""
    if job.progress.best_step is not None:
        state.load_best(job.checkpoints, job.parameters, job.progress.best_step)
    if job.config.method in ADAPTER_METHODS:
        grown = bool(job.config.new_tokens) or job.config.adapter is not None and has_tokenizer(job.config.adapter)
        save_adapter(job.model, folder / "adapter", job.config.model, tokenizer=tokenizer if grown else None)
        return folder / "adapter"
    save_model(job.model, tokenizer, folder / "model", overwrite=True)
    return folder / "model"
