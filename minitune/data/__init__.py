"""Records to examples to token ids, target masks and batches."""
