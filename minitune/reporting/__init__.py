"""What a run says while it goes on, and what it leaves to read."""
