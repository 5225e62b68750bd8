"""Applications of the library: each a script that uses nothing a user could not call."""
