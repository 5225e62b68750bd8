"""Model to files and back."""
