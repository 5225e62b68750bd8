"""Twenty steps of LoRA against transformers and PEFT in a plain loop: same adapters, same rows, same optimiser."""

import math

import pytest
import torch
import torch.nn.functional as F

from minitune.checkpoint.adapter import load_adapter, save_adapter
from minitune.checkpoint.huggingface import save_model
from minitune.checkpoint.load import load_model
from minitune.data.batching import collate
from minitune.model.config import LoRAConfig
from minitune.model.lora import add_lora
from minitune.model.trainable import trainable_parameters
from minitune.reporting.journal import Journal, read_metrics
from minitune.safetensors_io import read_tensors
from minitune.training import loop, state
from minitune.training.config import LoRAOptions, OptimizerConfig, ScheduleConfig, TrainConfig
from minitune.training.objectives import supervised
from minitune.training.optimizer import Optimizer
from tests.training.test_loop import examples

pytest.importorskip("peft")
STEPS, ACCUMULATION, WARMUP = 20, 2, 0.1


def documents(step, micro):
    """Rows of packed documents of one micro-batch, ragged in every way."""
    lengths = [5 + (7 * step + 13 * micro + 5 * i) % 30 for i in range(4)]
    a, b, c, d = examples(lengths, seed=100 * step + micro)
    return [[a, b], [c], [d]]


def ours(model, folder, rate):
    """Train through the loop; returns the losses."""
    config = TrainConfig(
        data="x", max_steps=STEPS, accumulation_steps=ACCUMULATION, lora=LoRAOptions(rank=4),
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=0.01), schedule=ScheduleConfig(warmup=WARMUP),
    ).resolved()  # fmt: skip
    parameters = trainable_parameters(model)
    batches = [collate(documents(step, micro), 0) for step in range(STEPS) for micro in range(ACCUMULATION)]
    progress = state.Progress()
    with Journal(folder, STEPS) as journal:
        loop.fit(loop.Job(
            config=config, model=model, parameters=parameters, optimizer=Optimizer(parameters, config.optimizer),
            objective=supervised, stream=lambda start: batches[start:], total_batches=len(batches), validation=None,
            sample=list, checkpoints=folder / "checkpoints", fingerprint={}, progress=progress, journal=journal,
        ))  # fmt: skip
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def theirs(base, adapter, rate):
    """Train in a plain loop, document by document; returns the losses and the adapter's tensors."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    losses, warmup = [], math.ceil(WARMUP * STEPS)
    for step in range(STEPS):
        total, count = 0.0, 0
        for micro in range(ACCUMULATION):
            for example in (e for row in documents(step, micro) for e in row):
                logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
                labels = [i if t else -100 for i, t in zip(example.ids, example.targets, strict=True)][1:]
                loss = F.cross_entropy(logits, torch.tensor(labels), reduction="sum")
                loss.backward()
                total, count = total + loss.item(), count + sum(label >= 0 for label in labels)
        for p in trained:
            p.grad /= count
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        x = (step - warmup) / (STEPS - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * x)
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses, get_peft_model_state_dict(model)


def distance(model, base, tmp_path, rate):
    """Train both ways; losses and every number must agree. Returns how far apart they are of what was learned."""
    save_adapter(model, tmp_path / "start", str(base))
    our_losses = ours(model, tmp_path, rate)
    save_adapter(model, tmp_path / "end", str(base))
    their_losses, their_tensors = theirs(base, tmp_path / "start", rate)
    assert our_losses == pytest.approx(their_losses, abs=1e-5)
    our_tensors = read_tensors(tmp_path / "end" / "adapter_model.safetensors")
    start = read_tensors(tmp_path / "start" / "adapter_model.safetensors")
    assert set(our_tensors) == set(their_tensors)
    apart = moved = 0.0
    for name, tensor in their_tensors.items():
        torch.testing.assert_close(our_tensors[name], tensor, atol=1e-4, rtol=0)
        apart += float((our_tensors[name] - tensor).double().square().sum())
        moved += float((tensor - start[name]).double().square().sum())
    return math.sqrt(apart / moved)


def test_twenty_steps_on_a_tiny_model(tiny_model, tmp_path):
    model = load_model(tiny_model, dtype=torch.float32)
    add_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=3)
    assert distance(model, tiny_model, tmp_path, rate=2e-3) < 1e-3


def test_twenty_steps_from_an_adapter_that_peft_made(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_rslora=True,
                        init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    get_peft_model(base, config).save_pretrained(tmp_path / "given")
    model = load_model(tiny_model, dtype=torch.float32)
    model.requires_grad_(False)
    load_adapter(model, tmp_path / "given")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora." in name)
    assert distance(model, tiny_model, tmp_path, rate=2e-3) < 1e-3


@pytest.mark.real
def test_twenty_steps_on_smollm2(smollm2_path, tmp_path):
    model = load_model(smollm2_path, dtype=torch.float32)
    save_model(model, None, tmp_path / "base")
    add_lora(model, LoRAConfig(rank=4, alpha=8.0), seed=3)
    # Adam moves a number whose gradient is all rounding by up to the rate a step, in either direction. Among a million
    # numbers a few are such at every step; their distance is the rate's, which is therefore kept below the bar.
    assert distance(model, tmp_path / "base", tmp_path, rate=5e-5) < 1e-3
