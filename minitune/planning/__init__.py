"""What a run will take before it runs: operations, seconds, money, what fits, and whether to fine-tune at all."""
