"""The error of bad input, which is told in one line."""

from typing import Any


class ConfigError(ValueError):
    """Bad input. Its text is the one line that a user sees; the process ends with exit code 2."""


def short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
