"""The CPU implementations: torch's own fast ops, chosen by the number of rows."""
