"""The result of one check."""

from typing import NamedTuple

GOOD, NOTE, BAD = "good", "note", "bad"  # note: a run works, but something could be better


class Check(NamedTuple):
    name: str
    state: str
    text: str
    advice: str = ""  # what to do; empty where nothing is
