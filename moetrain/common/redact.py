"""What looks like a secret, taken out of what is shown or sent elsewhere.

A value is one by the name of its field (`api_key`, `password`, `token`, ...), by its own form (keys of Hugging Face,
GitHub, OpenAI, AWS, wandb, Slack; name and password in an address; `token=...` inside of it), or because an environment
variable of such a name holds it. This finds what people usually do, not everything.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
NAME = re.compile(
    r"secret|passw|credential|api_?key|access_?key|private_?key|(?<![a-z])key(?![a-z])|token(?![a-z])|auth(?!or)",
    re.IGNORECASE,
)
AFTER_NAME = re.compile(rf"((?:{NAME.pattern})[\w.-]*[\"']?\s*[:=]).+", re.IGNORECASE | re.DOTALL)
SIGNED_IN = re.compile(r"://[^/@\s]+@")  # name and password in an address
FORM = re.compile(
    r"\b(?:hf_\w{20,}|gh[opsu]_\w{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abp]-[\w-]{10,}"
    r"|(?:wandb_v1_|local-)?[0-9a-f]{40}(?![0-9a-f]))"
)
SHORTEST = 8  # characters of an environment variable's value that is looked for inside of others


def redacted_text(text: str) -> str:
    """`text` with `***` for what looks like a secret."""
    for name, value in os.environ.items():
        if NAME.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return FORM.sub(HIDDEN, hide_passwords(AFTER_NAME.sub(rf"\1{HIDDEN}", text)))


def hide_passwords(text: str) -> str:
    """Return `text` with `***` for name and password in addresses."""
    return SIGNED_IN.sub(f"://{HIDDEN}@", text)


def redacted(tree: Any, name: str = "") -> Any:
    """A tree of mappings, lists and values with `***` for what looks like a secret; `name` is that of its field."""
    if isinstance(tree, Mapping):
        return {key: redacted(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value, name) for value in tree]
    if isinstance(tree, str) and tree:
        return HIDDEN if NAME.search(name) else redacted_text(tree)
    return tree


def holds_secret(tree: Any) -> bool:
    """Whether `redacted` would change a tree of dicts, lists and values."""
    return bool(redacted(tree) != tree)
