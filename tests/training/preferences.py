"""Pairs and judged answers made by hand, and training on them; shared by the tests of preferences."""

import torch

from minitune.checkpoint.load import load_model
from minitune.data.batching import collate_preferences
from minitune.data.examples import Example
from minitune.data.preferences import Judged, Pair, with_mismatches
from minitune.reporting.journal import Journal, read_metrics
from minitune.training import loop, state
from minitune.training.config import LoRAOptions, OptimizerConfig, PreferenceOptions, ScheduleConfig, TrainConfig
from minitune.training.optimizer import Optimizer
from minitune.training.preference import preference_objective
from minitune.training.run import choose_parameters

PAD = 259
RAGGED = ((3, 5, 9), (1, 30, 4), (12, 7, 7), (40, 1, 2), (6, 2, 25), (2, 11, 10), (25, 16, 3), (8, 3, 41))


def document(prompt, answer, origin="row"):
    """Return an example whose targets are the answer."""
    return Example(tuple(prompt + answer), (False,) * len(prompt) + (True,) * len(answer), origin)


def pairs(shapes=RAGGED, seed=0, margins=None):
    """Return pairs of random tokens; each shape is the number of those of (prompt, chosen, rejected)."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number, lengths in enumerate(shapes):
        prompt, *sides = (torch.randint(0, 256, (length,), generator=draw).tolist() for length in lengths)
        chosen, rejected = (document(prompt, side, f"row {number}") for side in sides)
        made.append(Pair(chosen, rejected, margin=None if margins is None else margins[number % len(margins)]))
    return made


def judged(shapes, seed=0):
    """Return judged answers of random tokens with mismatched ones; each shape is (prompt, answer, desirable)."""
    made = pairs([(prompt, answer, 1) for prompt, answer, _ in shapes], seed)
    return with_mismatches([Judged(pair.chosen, bool(shape[2])) for pair, shape in zip(made, shapes, strict=True)])


def batch_of(items, packing=False, pad_id=PAD):
    """Return one batch; with `packing` all of it lies in two rows."""
    half = (len(items) + 1) // 2
    rows = [items[:half], items[half:]] if packing and len(items) > 1 else [items] if packing else [[i] for i in items]
    return collate_preferences(rows, pad_id, packing=packing)


def config_of(kind, *, method="lora", dropout=0.0, accumulation=1, steps=1, rate=1e-3, clip=None, **options):
    """Return the resolved configuration of a run at a constant rate."""
    return TrainConfig(
        data="x", objective=kind, preference=PreferenceOptions(**options), method=method, max_steps=steps,
        accumulation_steps=accumulation,
        lora=LoRAOptions(rank=4, dropout=dropout) if method == "lora" else LoRAOptions(),
        optimizer=OptimizerConfig(learning_rate=rate, max_grad_norm=clip),
        schedule=ScheduleConfig("constant", warmup=0),
    ).resolved()  # fmt: skip


def prepared(folder, config, *, drawn=0.05):
    """Return a model with what trains chosen, and that; B of fresh adapters is drawn, so that they do something."""
    model = load_model(folder, dtype=torch.float32)
    parameters = choose_parameters(model, config)
    for index, (name, parameter) in enumerate(parameters.items()):
        if name.endswith("lora.B") and drawn:
            torch.nn.init.normal_(parameter, std=drawn, generator=torch.Generator().manual_seed(index))
    return model, parameters


class Recorder(Optimizer):
    """Keeps the averaged gradients of the last step."""

    def step(self, learning_rate):
        self.seen = {name: p.grad.clone() for name, p in self.parameters.items()}
        super().step(learning_rate)


def trained(model, parameters, config, batches, folder):
    """Run the loop over the batches; returns the lines of its steps and the gradients of the last one."""
    optimizer, steps = Recorder(parameters, config.optimizer), -(-len(batches) // config.accumulation_steps)
    with Journal(folder, steps) as journal:
        job = loop.Job(
            config=config, model=model, parameters=parameters, optimizer=optimizer,
            objective=preference_objective(config.objective, config.preference),
            stream=lambda start: batches[start:], total_batches=len(batches), validation=None, sample=list,
            checkpoints=folder / "checkpoints", fingerprint={}, progress=state.Progress(), journal=journal,
        )  # fmt: skip
        assert loop.fit(job) == "finished"
    return [line for line in read_metrics(folder) if "loss" in line], optimizer.seen
