"""Fuzzing: `make fuzz`. Not part of `make test`."""
