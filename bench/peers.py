"""The peers, each as its users run it at its best: fused AdamW, no key/value cache in training, no progress bars.

transformers and PEFT get a plain loop; TRL its trainer, timed inside it from `on_step_begin` to `on_step_end`.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch

from bench.cases import ALPHA, ANSWER, NEW, PROMPT, RANK, ROW_LENGTH, WIDTH, Case
from bench.worker import layer_rounds, layer_weight, pairs, read_data, reviews, windows

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(case: Case, cache: Path, channel: Any) -> None:
    """Run the peer of a case; ends with the channel."""
    if case.kind == "generate":
        return generation(case, cache, channel)
    if case.kind == "classify":
        return answers(case, cache, channel)
    if case.kind == "start":
        return start(case, cache, channel)
    if case.layer:
        return linear4bit(case, cache, channel)
    torch.manual_seed(0)
    if case.kind == "dpo":
        return dpo_trainer(case, cache, channel)
    if case.peer.startswith("trl"):
        return sft_trainer(case, cache, channel)
    build = {"litgpt": litgpt, "torchtune": torchtune}.get(case.peer, transformers_or_peft)
    plain_loop(case, cache, channel, *build(case, cache))


def _load(case: Case, cache: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, options = getattr(torch, case.dtype), {}
    if case.shape:
        from bench import models

        return models.transformers_4bit(case.shape, dtype, case.device)
    if case.peer == "bitsandbytes":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": case.device}
    return AutoModelForCausalLM.from_pretrained(cache / case.dtype, dtype=dtype, **options)


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")


def plain_loop(case: Case, cache: Path, channel: Any, model: Any, loss_of: Any) -> None:
    """Forward, backward, clip, AdamW; `loss_of(ids)` returns the mean loss of the next tokens of ids (B, T)."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=0.0, fused=True)
    for rows in windows(case, cache):
        channel.wait()
        loss = loss_of(torch.tensor(rows, device=case.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        channel.report(loss=loss.item(), tokens=case.batch * (case.length - 1))


def transformers_or_peft(case: Case, cache: Path) -> tuple[Any, Any]:
    """Return a transformers model, with PEFT's adapters where the case is LoRA."""
    model = _load(case, cache)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.kind in ("lora", "qlora"):
        from peft import get_peft_model

        model = get_peft_model(model, _lora_config())
    return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def sft_trainer(case: Case, cache: Path, channel: Any) -> None:
    """TRL's trainer with LoRA; a round is a step, or on real rows a pass over all of them."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Paced(SFTTrainer):
        """Keeps each step's loss and its number of target tokens."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.last = (loss, int(num_items_in_batch))
            return loss

    class Pace(TrainerCallback):
        """Waits at the first step of a round, reports at its last."""

        results = ()

        def on_step_begin(self, args, state, control, train_dataloader=None, **rest):
            self.steps = len(train_dataloader) if case.kind == "rows" else 1
            if state.global_step % self.steps == 0:
                self.results = []
                channel.wait()

        def on_step_end(self, args, state, control, **rest):
            loss, tokens = trainer.last
            self.results.append((loss.item(), tokens))
            if state.global_step % self.steps == 0:
                total = sum(tokens for _, tokens in self.results)
                channel.report(loss=sum(loss * tokens for loss, tokens in self.results) / total, tokens=total)

    packed = case.peer == "trl-packed"
    order = {"trl-grouped": "group_by_length"}.get(case.peer, "random" if case.kind == "rows" else "sequential")
    config = SFTConfig(
        per_device_train_batch_size=2 if packed else case.batch, max_length=ROW_LENGTH, packing=packed,
        train_sampling_strategy=order, **_trl_settings(case, cache),
    )  # fmt: skip
    trainer = Paced(
        model=_load(case, cache), args=config, train_dataset=Dataset.from_list(_trl_rows(case, cache)),
        processing_class=AutoTokenizer.from_pretrained(cache / case.dtype), peft_config=_lora_config(),
        callbacks=[Pace()],
    )  # fmt: skip
    trainer.train()


def _trl_settings(case: Case, cache: Path) -> dict[str, Any]:
    """Return what all of TRL's trainers are told."""
    return {
        "output_dir": str(cache / "trl"), "max_steps": 10**6, "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant", "optim": "adamw_torch_fused", "bf16": False, "use_cpu": True,
        "report_to": "none", "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip


def dpo_trainer(case: Case, cache: Path, channel: Any) -> None:
    """TRL's DPOTrainer with LoRA, the adapter switched off being the reference; a round is a step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Pace(TrainerCallback):
        """Waits at a step's beginning; reports the mean log-probability of its tokens, as our side does."""

        def on_step_begin(self, args, state, control, **rest):
            channel.wait()

        def on_step_end(self, args, state, control, **rest):
            sums = [trainer._metrics["train"][f"logps/{side}"][-1] for side in ("chosen", "rejected")]
            answer = case.length - case.prompt
            channel.report(loss=-sum(sums) / (2 * answer), tokens=2 * case.batch * answer)

    config = DPOConfig(
        per_device_train_batch_size=case.batch, max_length=None, train_sampling_strategy="sequential",
        **_trl_settings(case, cache),
    )  # fmt: skip
    trainer = DPOTrainer(
        model=_load(case, cache), args=config, processing_class=AutoTokenizer.from_pretrained(cache / case.dtype),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), peft_config=_lora_config(),
        callbacks=[Pace()],
    )  # fmt: skip
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batches = itertools.islice(pairs(case, cache), 50)
    rows = [dict(zip(names, row, strict=True)) for batch in batches for row in batch]
    trainer.train_dataset = Dataset.from_list(rows)  # in place of a text, which it would encode, with an end token
    trainer.train()


def _trl_rows(case: Case, cache: Path) -> list[dict[str, list[int]]]:
    """Return rows as TRL stores them: token ids, and labels that are -100 where nothing is learned."""
    if case.kind == "rows":
        pairs = [(row["ids"], row["targets"]) for row in read_data(cache)["rows"]]
        return [
            {"input_ids": ids, "labels": [i if learned else -100 for i, learned in zip(ids, targets, strict=True)]}
            for ids, targets in pairs
        ]
    text = read_data(cache)["text"]
    rows = [text[i : i + case.length] for i in range(0, len(text) - case.length + 1, case.length)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def generation(case: Case, cache: Path, channel: Any) -> None:
    """Continue one prompt greedily with the cache."""
    model = _load(case, cache).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([read_data(cache)["text"][:PROMPT]])
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    while True:
        channel.wait()
        with torch.inference_mode():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, PROMPT:].tolist()
        channel.report(tokens=len(ids), ids=ids)


def answers(case: Case, cache: Path, channel: Any) -> None:
    """Answer reviews row by row, greedily with the cache, as the documentation's loop does."""
    from transformers import AutoTokenizer

    model, tokenizer = _load(case, cache).eval(), AutoTokenizer.from_pretrained(cache / case.dtype)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    options = {"max_new_tokens": ANSWER, "do_sample": False, "use_cache": True, "eos_token_id": end, "pad_token_id": 0}
    for asked in reviews(cache):
        channel.wait()
        found = []
        for messages in asked:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
            cut = " [cut off]" * (end not in ids)
            found.append(tokenizer.decode(ids, skip_special_tokens=True).strip() + cut)
        channel.report(tokens=len(found), ids=found)


def linear4bit(case: Case, cache: Path, channel: Any) -> None:
    """Time bitsandbytes' quantised layer; in eval mode it may lay its weight out anew for the processor."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        WIDTH, WIDTH, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    layer.load_state_dict({"weight": layer_weight()})
    layer.to(case.device).train(case.peer.endswith("train"))
    layer_rounds(case, channel, layer)


def start(case: Case, cache: Path, channel: Any) -> None:
    """Import what a fine-tuning script imports, load a model."""
    import peft  # noqa: F401
    from trl import SFTTrainer  # noqa: F401 - `import trl` alone is lazy

    model = _load(case, cache)
    channel.wait()
    del model


def _weights(case: Case, cache: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(cache / case.dtype / "model.safetensors")


def litgpt(case: Case, cache: Path) -> tuple[Any, Any]:
    """Return litgpt's LoRA model with the same weights, and its own chunked loss."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    parts = ("query", "key", "value", "projection", "mlp")
    config = Config.from_name(
        "SmolLM2-135M-Instruct", lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.0,
        **{f"lora_{part}": True for part in parts},
    )  # fmt: skip
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, _weights(case, cache))
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    torch.set_default_dtype(getattr(torch, case.dtype))
    model = GPT(config)
    model.load_state_dict(weights, strict=False)
    model.lm_head.linear.weight = model.transformer.wte.weight  # tied, as in the checkpoint
    mark_only_lora_as_trainable(model)
    model.max_seq_length = case.length

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, ids[..., 1:])

    return model, loss_of


def torchtune(case: Case, cache: Path) -> tuple[Any, Any]:
    """Return torchtune's LoRA model and chunked loss; Llama 3.2's builder ties the head, scale 1 is plain rope."""
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3_2 import lora_llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    fields = json.loads((cache / case.dtype / "config.json").read_text(encoding="utf-8"))
    theta = fields.get("rope_theta") or fields["rope_parameters"]["rope_theta"]
    torch.set_default_dtype(getattr(torch, case.dtype))
    model = lora_llama3_2(
        ["q_proj", "k_proj", "v_proj", "output_proj"], True, False, vocab_size=fields["vocab_size"],
        num_layers=fields["num_hidden_layers"], num_heads=fields["num_attention_heads"],
        num_kv_heads=fields["num_key_value_heads"], embed_dim=fields["hidden_size"], max_seq_len=case.length,
        intermediate_dim=fields["intermediate_size"], norm_eps=fields["rms_norm_eps"],
        rope_base=int(theta), scale_factor=1, lora_rank=RANK, lora_alpha=ALPHA,
    )  # fmt: skip
    weights = hf_to_tune(_weights(case, cache), fields["num_attention_heads"], fields["num_key_value_heads"],
                         fields["hidden_size"])  # fmt: skip
    model.load_state_dict(weights, strict=False)
    set_trainable_params(model, get_adapter_params(model))
    chunked = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(chunked.num_output_chunks)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)
        return chunked(model(ids), labels)

    return model, loss_of
