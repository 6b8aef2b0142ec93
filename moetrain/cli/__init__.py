"""`moetrain VERB`."""

from moetrain.cli.parser import main

__all__ = ["main"]
