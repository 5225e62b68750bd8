"""The model that a command works on: the options that commands share, and the one way to load what they name."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is kept and computed."""

    model: str = "smollm2-135m-instruct"
    """A fetched model's name, a Hugging Face folder or a GGUF file."""
    adapter: str | None = None
    """A PEFT adapter folder to put on it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and arithmetic; auto is bfloat16 where the processor is fast at it."""
    quantize: Literal["auto", "none", "nf4", "fp4", "int8"] = "auto"
    """Keep the linear layers' weights in 4 or 8 bits; auto does as the adapter's training did."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """Triton's kernels or PyTorch alone; auto takes the kernels on a GPU."""

    def load(self) -> tuple[Any, Any]:
        """Return the model, in evaluation mode, and its tokenizer.

        Raises:
            ConfigError: a device or backend that is not here. CheckpointError: as `load_model`, and where the
                tokenizer has ids that the model lacks.
        """
        from minitune.checkpoint.load import load_model, load_tokenizer
        from minitune.device import choose_device, choose_dtype
        from minitune.ops.backend import set_backend

        set_backend(self.backend)
        tokenizer = load_tokenizer(self.model, adapter=self.adapter)
        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        model = load_model(self.model, dtype=dtype, device=device, adapter=self.adapter, quantize=self.quantize)
        tokenizer.check_fits(model.config.vocab_size)
        return model, tokenizer
