"""Keys and values of the tokens already read, so that decoding computes one token at a time.

The buffers are allocated once at full length and filled in place. Growing by concatenation was rejected:
it copies the whole cache for every token.

Where the rope depends on the length of the text (`dynamic`, `longrope`), what was read of a shorter text does not hold
for a longer one: not the keys, and above the first layer not the values either. Then the cache also keeps the tokens,
and they are read again when the text outgrows their frequencies. Transformers goes on with the old keys instead, or
leaves it to the caller; its answers then differ from those of a pass over the whole text.
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
        self.length = self.pending = 0
        self.config = config
        self.tokens = (
            torch.zeros((2, batch, max_length), dtype=torch.int64, device=device) if config.by_length else None
        )
        """Ids and positions of what was read, (2, B, max_length), where they may be needed again."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store key and value (B, K, T, d) after the first `length` tokens; return all up to there.

        `length` itself moves once per forward pass (`advance`), after the last layer.
        """
        end = self.end(key.shape[2])
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def end(self, tokens: int) -> int:
        """Return where `tokens` more would end; ValueError where there is no room for them."""
        if self.length + tokens > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens; {self.length + tokens} were asked for")
        return self.length + tokens

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as stored."""
        self.length += tokens

    def remember(self, ids: torch.Tensor, positions: torch.Tensor) -> bool:
        """Note the tokens that are read next, both (B, T); return whether all before them must be read again."""
        if self.tokens is None:
            return False
        end = self.end(ids.shape[1])
        self.tokens[:, :, self.length : end] = torch.stack((ids, positions))
        if self.length == 0:
            return False
        rope, longest = self.config.rope, self.config.max_positions
        before, now = ((self.tokens[1, :, at - 1] + 1).tolist() for at in (self.length, end))
        self.pending = end
        return not all(rope.settled(a, b, longest) for a, b in zip(before, now, strict=True))

    def restart(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Forget keys and values; return ids and positions (B, S) of all tokens up to those noted last."""
        self.length = 0
        return self.tokens[0, :, : self.pending], self.tokens[1, :, : self.pending]

    def select(self, rows: torch.Tensor) -> None:
        """Keep only the given batch rows (int64 indices), in that order."""
        if self.tokens is not None:
            self.tokens = self.tokens[:, rows]
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
