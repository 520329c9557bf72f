"""The engines that Fen is measured against, each run in a process of its own."""
