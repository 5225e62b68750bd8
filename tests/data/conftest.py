"""A real tokenizer small enough to write down: one token per byte, ChatML, with and without BOS."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from minitune.text.tokenizer import load_tokenizer

# ChatML with transformers' own marks around what is learned, so that transformers can be the judge of targets.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_byte_tokenizer(folder, *, bos=False, chat_template=CHATML):
    """Write a byte-level tokenizer into `folder`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Return tokenizers by name: "chat", "plain" (no chat template), "bos" (plain, with BOS)."""
    options = {"chat": {}, "plain": {"chat_template": None}, "bos": {"bos": True, "chat_template": None}}
    folders = {name: save_byte_tokenizer(tmp_path_factory.mktemp(name), **given) for name, given in options.items()}
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture
def with_template(tmp_path):
    """Return a function that makes a tokenizer with ChatML changed: what to put before it, and a replacement."""

    def make(before, old="", new=""):
        template = before + CHATML.replace(old, new, 1)
        return load_tokenizer(save_byte_tokenizer(tmp_path, chat_template=template))

    return make


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """Return transformers' tokenizer for the same files as the "chat" one."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path_factory.mktemp("judge")))
