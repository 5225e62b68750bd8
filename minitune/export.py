"""`python -m minitune.export`: write a model, with an adapter merged in, as a Hugging Face folder or a GGUF file."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from minitune.cli import parse
from minitune.errors import ConfigError, run_command
from minitune.loading import check_adapters, choose_adapters

FOUR_BITS = ("nf4", "fp4")
PROBE = (  # what the merged model is compared with the live one on
    "The harbour was quiet when the first boats came in. Two of them carried mackerel, the third a broken mast and a "
    "crew that would not say where it had been. Question: how many boats brought fish? Answer: two. The keeper wrote "
    "it down, as he did every morning: wind from the north-west, 12 knots, visibility good. def area(width, height): "
    "return width * height. In 1687 Newton published the laws of motion; the third says that every force has an equal "
    "and opposite one. Please list three reasons to keep a log, and explain each of them in one sentence."
)


@dataclass(frozen=True)
class ExportConfig:
    """What to export.

    Args:
        model: a fetched name, a Hugging Face folder or a .gguf file.
        output: the folder to write, or the .gguf file.
        format: hf is a Hugging Face folder; gguf is one file for llama.cpp, tokenizer and chat template included.
        adapter: an adapter's folder, as training writes it, or several by name, as [poet=FOLDER,judge=FOLDER].
        weights: of several adapters; their weighted sum is merged.
        merge: fold the adapter into the weights.
        dtype: of the weights written; as stored by default (float32 for a quantised GGUF). nf4 and fp4 store the linear
            layers in 4 bits, as bitsandbytes does; not with merge. q8_0 (8 bits and a scale for each 32) is GGUF's.
        quantize: with merge, what the adapter's base was kept in when it was trained; auto reads that from the adapter.
        max_shard_gb: above this many gigabytes the weights are split over several files.
        overwrite: replace what was exported there before.
    """

    output: str
    model: str = "smollm2-135m-instruct"
    format: Literal["hf", "gguf"] = "hf"
    adapter: tuple[str, ...] | str | None = None
    weights: tuple[float, ...] | None = None
    merge: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "nf4", "fp4", "q8_0"] | None = None
    quantize: Literal["auto", "none", "nf4", "fp4", "int8"] = "auto"
    max_shard_gb: float = 4.0
    overwrite: bool = False

    def __post_init__(self):
        """Refuse combinations without meaning."""
        if isinstance(check_adapters(self.adapter, None, self.weights), dict) and self.weights is None:
            raise ConfigError("several adapters are merged as their sum; give a weight each, as --weights [0.7,0.3]")
        if self.merge and self.adapter is None:
            raise ConfigError("merge needs an adapter; give --adapter FOLDER, or leave --merge out to convert")
        if self.adapter is not None and not self.merge:
            raise ConfigError("an adapter is exported merged; add --merge (alone it has PEFT's format already)")
        if self.merge and self.dtype in FOUR_BITS:
            raise ConfigError(
                f"merging into {self.dtype} is refused: 4 bits are too coarse for an update (of one of 1% of the "
                "weights about 1.5% survives); merge into bfloat16, and keep the adapter beside a 4-bit base"
            )
        if self.quantize != "auto" and not self.merge:
            raise ConfigError("quantize belongs to merge; to write 4 bits, use --dtype nf4")
        if self.dtype in ((*FOUR_BITS,) if self.format == "gguf" else ("q8_0",)):
            other = "--format hf" if self.format == "gguf" else "--format gguf"
            raise ConfigError(f"dtype {self.dtype} is not one of --format {self.format}; use {other}, or another dtype")
        if self.format == "gguf" and self.max_shard_gb != ExportConfig.max_shard_gb:
            raise ConfigError("max_shard_gb belongs to --format hf; a GGUF file is one file")
        if not self.max_shard_gb > 0:
            raise ConfigError(f"max_shard_gb is {self.max_shard_gb}; it must be above 0")


def main(argv: list[str] | None = None) -> None:
    """Export as `argv` says."""
    config = parse(
        ExportConfig, argv, prog="python -m minitune.export",
        description="Write a model, with an adapter merged in, for transformers and others, or for llama.cpp.",
    )  # fmt: skip
    from minitune.checkpoint.load import has_tokenizer, load_model, load_tokenizer

    _check_output(config)
    adapters = check_adapters(config.adapter, None, config.weights)
    tokenizer = load_tokenizer(config.model, adapter=adapters) if has_tokenizer(config.model) else None
    if tokenizer is None:
        print(f"{config.model} has no tokenizer; none is written")
    report = None
    if config.merge:
        # A merge starts from what is stored, so that a weight is rounded to the dtype once, with its update.
        model = load_model(config.model, adapter=adapters, quantize=config.quantize, keep_quantized=False)
        choose_adapters(model, None, adapters, config.weights)
        report = merged(model, tokenizer, "float32" if config.dtype == "q8_0" else config.dtype)
    elif config.dtype in FOUR_BITS:
        model = load_model(config.model, quantize=config.dtype, keep_quantized=False)
    else:  # GGUF keeps vectors in fp32, so that only what is written is rounded
        model = load_model(config.model, dtype=None if config.format == "gguf" else config.dtype)
    _save(config, model, tokenizer, report)
    chat = " --chat" if tokenizer is not None and tokenizer.chat_template else ""
    print(f"written to {config.output}; load it with: python -m minitune.generate --model {config.output}{chat}")


def _check_output(config: ExportConfig) -> None:
    """Raise CheckpointError where the output is in the way, before anything is loaded."""
    if config.format == "gguf":
        from minitune.checkpoint.gguf_writer import check_gguf_output as check_output
    else:
        from minitune.checkpoint.huggingface import check_output
    check_output(config.output, overwrite=config.overwrite)


def _save(config: ExportConfig, model: Any, tokenizer: Any, report: dict[str, Any] | None) -> None:
    """Write the model in the format asked for, and beside a folder's weights what a merge did."""
    if config.format == "gguf":
        from minitune.checkpoint.gguf_writer import save_gguf

        for note in save_gguf(model, tokenizer, config.output, dtype=config.dtype, overwrite=config.overwrite):
            print(f"note: {note}")
        if report and config.dtype == "q8_0":
            print("note: the merge was into float32; the file rounds it to 8 bits after that")
        return
    from minitune.checkpoint.huggingface import save_model
    from minitune.files import write_json

    save_model(
        model, tokenizer, config.output,
        max_shard_bytes=int(config.max_shard_gb * 1e9), overwrite=config.overwrite,
    )  # fmt: skip
    if report:
        write_json(Path(config.output) / "merge_report.json", report)


def merged(model: Any, tokenizer: Any, dtype: str | None) -> dict[str, Any]:
    """Merge the model's adapter in place, into `dtype`; print and return what survived, and what changed by it."""
    from minitune.checkpoint.merge import merge
    from minitune.device import as_dtype
    from minitune.evaluation.divergence import kl_divergence, next_token_log_probabilities

    ids = tokenizer.encode(PROBE) if tokenizer else list(range(min(128, model.config.vocab_size)))
    ids = ids[: model.config.longest]
    live = None if model.config.reward else next_token_log_probabilities(model, ids)
    report = merge(model, as_dtype(dtype))
    if live is None:  # it writes no tokens
        print(report)
        return asdict(report)
    divergence = kl_divergence(live, next_token_log_probabilities(model, ids))
    print(report)
    print(f"KL(live || merged) = {divergence:.2e} nats a token over {len(ids)} tokens of a fixed text")
    return {**asdict(report), "kl_nats_per_token": divergence, "kl_tokens": len(ids)}


if __name__ == "__main__":
    run_command(main)
