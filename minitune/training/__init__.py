"""Run configuration, the only loop, optimisers, state."""
