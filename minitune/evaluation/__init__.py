"""Perplexity and classification, with intervals."""
