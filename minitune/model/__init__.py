"""The one transformer, its configuration, cache and adapters."""
