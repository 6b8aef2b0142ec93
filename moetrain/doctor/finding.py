"""One line of what the doctor says."""

from typing import NamedTuple

GOOD, NOTE, BAD = "good", "note", "bad"  # a note: a run works, but less well


class Finding(NamedTuple):
    name: str
    state: str
    text: str
    advice: str = ""  # what to do; where it is not good
