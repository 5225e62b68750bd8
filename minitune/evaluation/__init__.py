"""Metrics with their intervals, of one model or of two on the same rows; perplexity, classification, reward, judge."""
