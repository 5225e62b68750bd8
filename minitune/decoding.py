"""Generation over a model: token ids in, token ids out, and the same for text.

One pass reads the prompts (left-padded to the longest), then each pass reads one token per row against the
cache of keys and values. Three things keep it fast: the head runs on the last position only, what all prompts
of a batch have in common (system message, instruction, few-shot examples) is read once and copied, and rows
that have ended leave the batch. Continuous batching (new rows enter as old ones leave) was rejected: it pays
off for servers, and here batches are sorted by length.
"""

import hashlib
import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitune.errors import ConfigError, DataError, check_counts, nearest
from minitune.model.adapter_set import check_names, chosen_rows
from minitune.model.cache import KVCache
from minitune.model.lora import hold_scales
from minitune.model.single import single_pass
from minitune.model.transformer import Transformer
from minitune.ops.linear import projections
from minitune.sampling import Sampling, next_tokens
from minitune.text.chat import render_chat
from minitune.text.tokenizer import Tokenizer

SHARED_PREFIX = 16  # tokens; a shorter common prefix is not worth a pass of its own

Prompt = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """A generated text, its length in tokens, and whether it ended by itself or at a stop string."""

    text: str
    tokens: int
    finished: bool


def generate(model: Transformer, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> str:
    """Answer one prompt: a user's text, or a list of messages `{"role", "content"}`.

    Args:
        model: the model, on any device.
        tokenizer: its tokenizer.
        prompt: text becomes a user message where the tokenizer has a chat template, else it is continued.
        options: the fields of `Sampling` (temperature, top_k, ...) and the options of `generate_texts`
            (max_new_tokens, stop, raw, seed); `on_text` here gets the text alone, and `adapter` is the name of one.

    Returns:
        The answer without its end-of-turn token and stop string.

    Raises:
        ConfigError, DataError: as `generate_texts`.
    """
    fields = Sampling.__dataclass_fields__
    sampling = Sampling(**{name: options.pop(name) for name in list(options) if name in fields})
    known = ("max_new_tokens", "stop", "raw", "seed", "on_text", "adapter")
    for name in options:
        if name not in known:
            raise ConfigError(f"generate has no option '{name}'{nearest(name, [*fields, *known])}")
    on_text = options.pop("on_text", None)
    relay = None if on_text is None else lambda row, text: on_text(text)
    if "adapter" in options:
        options["adapters"] = [options.pop("adapter")]
    return generate_texts(model, tokenizer, [prompt], sampling=sampling, on_text=relay, **options)[0].text


def generate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    stop: Sequence[str] = (),
    raw: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    adapters: Sequence[str | None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer many prompts, in batches sorted by length.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: texts or lists of messages, as for `generate`.
        max_new_tokens: the longest answer, in tokens.
        sampling: how tokens are chosen.
        stop: an answer ends before the first of these strings, wherever token borders fall.
        raw: continue texts as they are, without the chat template.
        seed: with sampling, fixes every answer; an answer does not depend on its batch.
        batch_size: prompts in one batch.
        adapters: for each prompt the name of the adapter that answers it, None for the base alone; by default the one
            that is chosen answers all.
        on_text: called with (index of the prompt, new text) while the answers grow; the pieces join to the answer.
        on_batch: called with the number of prompts that each batch finished.

    Returns:
        One answer per prompt, in the order of the prompts.

    Raises:
        DataError: a prompt is empty or too long. ConfigError: an option is out of range, or messages are given
            to a tokenizer without chat template. CheckpointError: the tokenizer has ids that the model lacks.
    """
    if "" in stop:
        raise ConfigError("a stop string is empty; every answer would end before it began")
    tokenizer.check_fits(model.config.vocab_size)
    streams = [_AnswerStream(tokenizer.stream(), stop) for _ in prompts]

    def on_token(row: int, token: int) -> bool:
        new = streams[row].push(token)
        if new and on_text:
            on_text(row, new)
        return streams[row].stopped

    answers = generate_ids(
        model,
        [encode_prompt(tokenizer, prompt, raw=raw) for prompt in prompts],
        max_new_tokens=max_new_tokens, sampling=sampling, end_ids=tokenizer.end_ids, on_token=on_token,
        seed=seed, batch_size=batch_size, adapters=adapters, on_batch=on_batch,
    )  # fmt: skip
    for row, stream in enumerate(streams):
        last = stream.finish()
        if last and on_text:
            on_text(row, last)
    return [
        Answer(stream.text, len(ids), stream.stopped or len(ids) < max_new_tokens)
        for stream, ids in zip(streams, answers, strict=True)
    ]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Return the ids that a model continues: rendered messages with the assistant's turn opened, or plain text.

    Raises ConfigError for messages without a chat template, DataError for an empty prompt.
    """
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        raise DataError("the prompt is empty; give it some text")
    if isinstance(prompt, str):
        if raw or tokenizer.chat_template is None:
            return tokenizer.encode(prompt)
        prompt = [{"role": "user", "content": prompt}]
    if raw or tokenizer.chat_template is None:
        why = "raw continues plain text" if raw else "this tokenizer has no chat template"
        raise ConfigError(f"a list of messages cannot be rendered: {why}; give the prompt as text")
    return render_chat(tokenizer, list(prompt), add_generation_prompt=True).ids


class _AnswerStream:
    """The text of one growing answer; holds back what may yet turn out to be the start of a stop string."""

    def __init__(self, decoder: Any, stop: Sequence[str]):
        self.decoder, self.stop = decoder, stop
        self.text = self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        return self._release(self.decoder.push(token), last=False)

    def finish(self) -> str:
        """Return what is left at the end of the answer."""
        return "" if self.stopped else self._release(self.decoder.flush(), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        text = self.held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        self.stopped = bool(found)
        keep = min(found) if found else len(text) if last else len(text) - self._overlap(text)
        self.text += text[:keep]
        self.held = text[keep:]
        return text[:keep]

    def _overlap(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        sizes = (size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
        return max(sizes, default=0)


@torch.inference_mode()
def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    end_ids: Sequence[int] = (),
    on_token: Callable[[int, int], bool | None] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    adapters: Sequence[str | None] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until an end token, `max_new_tokens`, or `on_token` says so.

    Args:
        model: the model; dropout is off while it generates.
        prompts: token ids, one list per row; lengths may differ.
        max_new_tokens: tokens to generate per row at most.
        sampling: how tokens are chosen.
        end_ids: tokens that end a row; they are not part of the result.
        on_token: called with (row, token) for each new token but the end; a true result ends that row after it. Neither
            the model nor the choice of its adapters may change meanwhile.
        seed: with sampling, row i draws from a stream of its own, made of `seed` and i.
        batch_size: rows per batch (longest prompts first); None takes all in one.
        adapters: the name of each row's adapter, None for the base alone; by default the chosen one is everybody's.
        on_batch: called after each batch with its number of rows.

    Returns:
        The new ids of each row, in the order of `prompts`.

    Raises:
        DataError: a prompt is empty, too long for the model's positions, or has an id that the model lacks.
        ConfigError: max_new_tokens or batch_size is below 1, or an adapter is not there.
    """
    _check(model, prompts, max_new_tokens, batch_size, adapters)
    answers: list[list[int]] = [[] for _ in prompts]
    ends = frozenset(end_ids)

    def accept(row: int, token: int) -> bool:
        """Store a token; return whether the row goes on."""
        if token in ends:
            return False
        answers[row].append(token)
        return not (on_token and on_token(row, token))

    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    size = batch_size or max(len(prompts), 1)
    was_training = model.training
    model.eval()
    try:
        with hold_scales(model):
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                names = None if adapters is None else {row: adapters[row] for row in rows}
                batch = {row: prompts[row] for row in rows}
                _generate_batch(model, batch, max_new_tokens, sampling, accept, seed, names)
                if on_batch:
                    on_batch(len(rows))
    finally:
        model.train(was_training)
    return answers


def _check(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int | None,
    adapters: Sequence[str | None] | None,
) -> None:  # fmt: skip
    """Refuse what cannot be generated, before any work is done."""
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    if adapters is not None and len(adapters) != len(prompts):
        raise ConfigError(f"there are {len(adapters)} names of adapters for {len(prompts)} prompts; give one each")
    check_names(model, adapters or ())
    config = model.config
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {row + 1} has no tokens; give it some text")
        if len(prompt) + max_new_tokens > config.longest:
            raise DataError(
                f"prompt {row + 1} has {len(prompt)} tokens and {max_new_tokens} new ones may follow, but the model "
                f"reads at most {config.longest}; shorten the prompt or lower max_new_tokens"
            )


def _generate_batch(
    model: Transformer,
    prompts: dict[int, Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    accept: Callable[[int, int], bool],
    seed: int,
    names: dict[int, str | None] | None,
) -> None:
    """Generate for one batch; `prompts` and `names` map row numbers to ids and adapters, `accept` takes each token."""
    rows, head = list(prompts), model.head_weight
    lengths = torch.tensor([len(prompt) for prompt in prompts.values()], device=head.device)
    with chosen_rows(model, names and list(names.values())):
        share = len(set((names or {}).values())) < 2
        hidden, cache = _read_prompts(model, list(prompts.values()), lengths, max_new_tokens, share)
    seen, uniforms = _seen(prompts, head), _uniforms(rows, max_new_tokens, seed).to(head.device)
    padded = len(set(lengths.tolist())) > 1
    single, alone = None, len(rows) == 1
    for step in range(max_new_tokens):
        (logits,) = projections(hidden[:, -1], [head], [None], [None])  # (B, V)
        tokens = next_tokens(model.capped(logits), sampling, seen, uniforms[:, step])
        going = [i for i, token in enumerate(tokens.tolist()) if accept(rows[i], token)]
        if not going or step + 1 == max_new_tokens:
            return
        seen.scatter_(1, tokens[:, None], True)
        if len(going) < len(rows):
            rows, keep = [rows[i] for i in going], torch.tensor(going, device=head.device)
            cache.select(keep)
            tokens, lengths, seen, uniforms = (tensor[keep] for tensor in (tokens, lengths, seen, uniforms))
        positions = lengths[:, None] + step if padded else None
        with chosen_rows(model, names and [names[row] for row in rows]):
            if step == 0 and alone:
                single = single_pass(model, cache)
            if single is not None:
                hidden = single(tokens[:, None])
            else:
                hidden = model.hidden(tokens[:, None], positions=positions, cache=cache)


def _read_prompts(
    model: Transformer, prompts: list[Sequence[int]], lengths: torch.Tensor, max_new_tokens: int, share: bool
) -> tuple[torch.Tensor, KVCache]:
    """Read left-padded prompts; return hidden states (B, T', D), the last of which counts, and the cache.

    Where `share`, what all have in common is read once: not by different adapters.
    """
    device, dtype = model.head_weight.device, model.head_weight.dtype
    width = int(lengths.max())
    pads = width - lengths  # (B,)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    positions = (torch.arange(width, device=device) - pads[:, None]).clamp(min=0)
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, dtype, device)
    # At least one token of every prompt is read here, so that each row has a last hidden state.
    prefix = os.path.commonprefix([list(prompt[:-1]) for prompt in prompts])
    share = share and len(prompts) > 1 and len(prefix) >= SHARED_PREFIX and not model.config.by_length
    start = len(prefix) if share else 0
    if start:
        _fill_shared(model, prefix, pads, cache)
    places = positions[:, start:] if bool(pads.any()) or start else None
    return model.hidden(ids[:, start:], positions=places, cache=cache), cache


def _fill_shared(model: Transformer, prefix: list[int], pads: torch.Tensor, cache: KVCache) -> None:
    """Read `prefix` (P tokens) once and store it at each row's own offset, in slots 0 to P of the cache.

    The longest row has no padding, so the tokens after slot P are read next. Rows with padding hold only the
    first P - pad tokens of the prefix here; the others lie after slot P and are read again with the rest.
    """
    device, dtype = cache.keys[0].device, cache.keys[0].dtype
    size = len(prefix)
    shared = KVCache(model.config, 1, size, dtype, device)
    model.hidden(torch.tensor([prefix], device=device), cache=shared)
    source = (torch.arange(size, device=device) - pads[:, None]).clamp(min=0)  # (B, P)
    for stored, read in ((cache.keys, shared.keys), (cache.values, shared.values)):
        for layer, tensor in enumerate(read):
            stored[layer][:, :, :size] = tensor[0][:, source].transpose(0, 1)  # (K, B, P, d) -> (B, K, P, d)
    cache.advance(size)


def _seen(prompts: dict[int, Sequence[int]], head: torch.Tensor) -> torch.Tensor:
    """Return (B, V) bool: which tokens each prompt holds; padding does not count."""
    seen = torch.zeros(len(prompts), head.shape[0], dtype=torch.bool, device=head.device)
    for row, prompt in enumerate(prompts.values()):
        seen[row, torch.tensor(list(prompt), device=head.device)] = True
    return seen


def _uniforms(rows: list[int], steps: int, seed: int) -> torch.Tensor:
    """Return (B, steps) uniform numbers; each row's stream is seeded by a hash of (seed, row)."""
    streams = []
    for row in rows:
        digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        streams.append(torch.rand(steps, generator=generator))
    return torch.stack(streams)
