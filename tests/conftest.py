"""Fixtures for every test: the real model, fetched once, and tiny random models in Hugging Face's format."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter then runs the kernels; it has to know before its first import
    os.environ.setdefault("TRITON_INTERPRET", "1")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched on first use."""
    from minitune.sources import fetch

    return fetch("smollm2-135m-instruct", progress=False)


@pytest.fixture(scope="session")
def tiny_folder():
    """A function that writes a random Llama of about 50,000 parameters, with a byte tokenizer, by transformers."""

    def make(folder, *, tokenizer: bool = True, dtype: str = "float32", max_shard_size="5GB", **config) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = {
            "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 259,
        }  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, "initializer_range": 0.2, **config}))
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # drawn too, so that none can be left out unnoticed
                parameter.data.add_(torch.randn(parameter.shape) * 0.3)
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer:
            _byte_tokenizer().save_pretrained(folder)
        return Path(folder)

    return make


@pytest.fixture(scope="session")
def save_reward_adapter():
    """Save an adapter of a model's folder that changes nothing but brings a drawn reward head; returns its folder."""

    def save(model_folder, folder: Path) -> str:
        from minitune import load_model
        from minitune.checkpoint.adapter import save_adapter
        from minitune.model.config import LoRAConfig
        from minitune.model.lora import add_lora
        from minitune.model.transformer import add_score_head

        model = load_model(model_folder)
        add_lora(model, LoRAConfig(rank=2))
        add_score_head(model)
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
        save_adapter(model, folder)
        return str(folder)

    return save


def _byte_tokenizer():
    """One token a byte, four special ones, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: id for id, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    outer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[3],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    outer.chat_template = CHAT_TEMPLATE
    return outer
