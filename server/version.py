"""Fen's version."""

from __future__ import annotations

import importlib.metadata

SOURCE_TREE = "0+source"  # of a folder that runs without ever having been installed


def version() -> str:
    try:
        return importlib.metadata.version("fen-engine")
    except importlib.metadata.PackageNotFoundError:
        return SOURCE_TREE
