"""Keys and values of the tokens already read, so that decoding computes one token at a time.

The buffers are allocated once at full length and filled in place. Growing by concatenation was rejected:
it copies the whole cache for every token.
"""

import torch

from minitune.model.config import ModelConfig


class KVCache:
    """Per layer, keys and values of shape (B, K, max_length, d); `length` tokens are stored in each."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """Allocate for `batch` rows of at most `max_length` tokens; bytes: 2 L B K max_length d itemsize."""
        shape = (batch, config.num_kv_heads, max_length, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store key and value (B, K, T, d) after the first `length` tokens; return all up to there.

        `length` itself moves once per forward pass (`advance`), after the last layer.
        """
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens; {end} were asked for")
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as stored."""
        self.length += tokens

    def select(self, rows: torch.Tensor) -> None:
        """Keep only the given batch rows (int64 indices), in that order."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
