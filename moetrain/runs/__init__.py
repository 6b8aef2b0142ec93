"""The folder of a run: its name, its lock, its starts."""

from moetrain.runs.folder import (
    check_writable,
    config_of,
    corpus_of,
    create,
    find,
    folder_of,
    forget_tracking,
    heartbeats,
    keep_corpus,
    keep_model,
    keep_submitted,
    make_name,
    model_folder,
)

__all__ = [
    "check_writable",
    "config_of",
    "corpus_of",
    "create",
    "find",
    "folder_of",
    "forget_tracking",
    "heartbeats",
    "keep_corpus",
    "keep_model",
    "keep_submitted",
    "make_name",
    "model_folder",
]
