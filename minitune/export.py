"""`python -m minitune.export`: write a model, with an adapter merged in, as a Hugging Face folder."""

from dataclasses import dataclass
from typing import Literal

from minitune.cli import parse
from minitune.errors import ConfigError, run_command


@dataclass(frozen=True)
class ExportConfig:
    """What to export.

    Args:
        model: a fetched name, a Hugging Face folder or a .gguf file.
        output: the folder to write.
        adapter: an adapter's folder, as training writes it.
        merge: fold the adapter into the weights.
        dtype: of the weights written; as stored by default (float32 for a quantised GGUF).
        max_shard_gb: above this many gigabytes the weights are split over several files.
        overwrite: replace an exported model that is in the output folder.
    """

    model: str
    output: str
    adapter: str | None = None
    merge: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_gb: float = 4.0
    overwrite: bool = False

    def __post_init__(self):
        """Refuse combinations without meaning."""
        if self.merge and self.adapter is None:
            raise ConfigError("merge needs an adapter; give --adapter FOLDER, or leave --merge out to convert")
        if self.adapter is not None and not self.merge:
            raise ConfigError("an adapter is exported merged; add --merge (alone it has PEFT's format already)")
        if not self.max_shard_gb > 0:
            raise ConfigError(f"max_shard_gb is {self.max_shard_gb}; it must be above 0")


def main(argv: list[str] | None = None) -> None:
    """Export as `argv` says."""
    config = parse(
        ExportConfig, argv, prog="python -m minitune.export",
        description="Write a model, with an adapter merged in, as a folder that transformers and others load.",
    )  # fmt: skip
    from minitune.checkpoint.huggingface import check_output, save_model
    from minitune.checkpoint.load import has_tokenizer, load_model, load_tokenizer
    from minitune.checkpoint.merge import merge

    check_output(config.output, overwrite=config.overwrite)
    tokenizer = load_tokenizer(config.model) if has_tokenizer(config.model) else None
    if tokenizer is None:
        print(f"{config.model} has no tokenizer; none is written")
    model = load_model(config.model, dtype=config.dtype, adapter=config.adapter)
    if config.merge:
        print(merge(model))
    save_model(
        model, tokenizer, config.output,
        max_shard_bytes=int(config.max_shard_gb * 1e9), overwrite=config.overwrite,
    )  # fmt: skip
    print(f"written to {config.output}; load it with: python -m minitune.generate --model {config.output} --chat")


if __name__ == "__main__":
    run_command(main)
