"""Which fields Hydra's overrides set."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import yaml


def fields_of(overrides: Sequence[str]) -> Iterator[str]:
    """The fields and groups that Hydra's overrides set."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        if value.startswith("{"):  # a whole section at once
            with suppress(yaml.YAMLError):
                yield from leaves({key: yaml.safe_load(value.replace(":", ": "))})
                continue
        yield key


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all that is in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
