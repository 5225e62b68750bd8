"""Whole-job comparisons with peers: the same job, the same numbers in, two processes, taking turns."""
