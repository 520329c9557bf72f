"""Measurements: always beside the limit of the machine, measured in the same run, or beside peers in the same run."""
