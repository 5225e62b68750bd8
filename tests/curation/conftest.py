"""The byte-level tokenizers of the data tests serve here too."""

from tests.data.conftest import tokenizers

__all__ = ["tokenizers"]
