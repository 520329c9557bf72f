"""`fen bench serve` and `sweep`: load for any server that speaks the OpenAI API, and what is made of its answers."""
