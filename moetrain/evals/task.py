"""Tasks of an evaluation: questions whose choices are scored, prompts that the model answers itself. No torch."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ARTICLES = r"(?i)\b(a|an|the)\b"


class Question(NamedTuple):
    """A question: the log-likelihood of each continuation, given its context, decides which choice the model takes.

    A single continuation is no choice: its bits per byte are measured.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    texts: tuple[str, ...]  # of the choices: log-likelihoods are divided by their lengths
    gold: int  # the right choice


def ask(context: str, choices: Sequence[str], gold: int, delimiter: str = " ") -> Question:
    """Return the question with one context, which `delimiter` parts from each choice."""
    continuations = tuple(f"{delimiter}{choice}" for choice in choices)
    return Question((context,) * len(choices), continuations, tuple(choices), gold)


class Prompt(NamedTuple):
    """A prompt that the model continues, and the answers that count as right."""

    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Extract:
    """Where the answer stands in what the model wrote: lm-eval's filter `regex`."""

    name: str
    pattern: str
    group: int = 0  # of the matches, the first; -1: the last
    fallback: str = "[invalid]"

    def find(self, text: str) -> str:
        """Return the match in `text`, without white space around it."""
        found = re.findall(self.pattern, text)
        if not found or self.group >= len(found):
            return self.fallback
        match = found[self.group]
        if isinstance(match, tuple):
            match = next((part for part in match if part), self.fallback)
        return str(match).strip()


WHOLE = (Extract("", r"(?s)\A.*\Z", fallback=""),)  # all that was written


@dataclass(frozen=True)
class Comparison:
    """What is left out before an answer is compared with the right ones, in lm-eval's order."""

    regexes: tuple[str, ...] = ()
    case: bool = False
    punctuation: bool = False

    def normalize(self, text: str) -> str:
        """Return `text` without what is left out; white space counts as one space, and at the ends as none."""
        for pattern in self.regexes:
            text = re.sub(pattern, "", text)
        text = text.lower() if self.case else text
        text = text.translate(str.maketrans("", "", string.punctuation)) if self.punctuation else text
        return " ".join(text.split())

    def match(self, written: str, answers: tuple[str, ...]) -> bool:
        """Tell whether what was written is one of the answers."""
        return self.normalize(written) in {self.normalize(answer) for answer in answers}


@dataclass(frozen=True)
class ChoiceTask:
    """Questions whose choices are scored."""

    name: str
    questions: tuple[Question, ...]
    shots: int  # examples in each context
    primary: str = "acc"  # the metric that the task is known for

    def __len__(self) -> int:
        return len(self.questions)


@dataclass(frozen=True)
class PromptTask:
    """Prompts that the model continues greedily, token by token, until a stop sequence, its end of text or a limit."""

    name: str
    prompts: tuple[Prompt, ...]
    shots: int
    stop: tuple[str, ...] = ("\n\n",)
    max_tokens: int = 256
    extracts: tuple[Extract, ...] = WHOLE
    comparison: Comparison = Comparison()
    primary: str = "exact_match"

    def __len__(self) -> int:
        return len(self.prompts)


Task = ChoiceTask | PromptTask
