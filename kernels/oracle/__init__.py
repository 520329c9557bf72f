"""Plain float32 torch versions of every kernel: what is correct. Used by tests and benchmarks only."""
