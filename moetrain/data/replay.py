"""`router.replay`: training sequences with the experts that were recorded for their tokens.

A recorded sample is found by its tokens, so it does not matter how conversations are packed or in which order they
come. Of `data=chat` a sample is a conversation, without the last token, which does not go in; else it is a sequence of
`train.seq_len` tokens.

B sequences, L positions, P passes through layers with experts, K experts a token.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.common.errors import ConfigError
from moetrain.config import Config, HuggingFace
from moetrain.config.architecture import read_json
from moetrain.config.hugging_face import find_folder
from moetrain.data.loader import Corpus, Samples, Sequences
from moetrain.moe.recorded import ChoiceFacts, RoutedExperts, hash_tokenizer, read_facts, read_routed_experts

FIELD = "router.replay"
OURS = "moetrain"  # the model type of presets
VARYING = {  # routers whose tokens do not all choose as many experts as was recorded
    "top_p": "whose tokens choose any number of experts",
    "expert_choice": "whose experts choose their tokens",
    "frozen": "whose tokens choose more experts from step to step",
}
AT_A_TIME = 64  # sequences
SHOWN = 16  # tokens of a sample that an error shows


def describe_model(config: Config, tokenizer: str = "") -> ChoiceFacts:
    """Return what choices of the configured model have to be of."""
    m = config.model
    kind = OURS
    if isinstance(m, HuggingFace):
        kind = str(read_json(find_folder(m.path, config.run.model_dump())).get("model_type"))
    num_experts = max(m.experts_of_layers) + m.num_zero_compute
    return ChoiceFacts(kind, num_experts, len(m.pass_names), max(config.top_k_of_layers), tokenizer)


def check_routers(config: Config, field: str) -> None:
    """Raise `ConfigError` that begins with `field` where tokens do not choose a known number of experts."""
    if not isinstance(config.model, HuggingFace) and (why := VARYING.get(config.router.name)):
        raise ConfigError(f"{field}: not for the router {config.router.name}, {why}")


def check_file(config: Config) -> None:
    """Raise `ConfigError` where `router.replay` names no file, or one of another model; its arrays are not read."""
    path = config.router.replay
    if path is None:
        return
    check_routers(config, f"{FIELD}={path}")
    if config.train.objective not in ("lm", "sft"):
        raise ConfigError(f"{FIELD}={path}: not for train.objective={config.train.objective}")
    if said := read_facts(Path(path), FIELD).find_difference(describe_model(config)):
        raise ConfigError(f"{FIELD}={path}: {said}")


class ReplayLoader:
    """Training sequences of another loader, with the recorded experts of their tokens."""

    def __init__(self, inner: Samples, corpus: Corpus, config: Config) -> None:
        """Raises `ConfigError` where the file is not one, or is of another model or tokenizer."""
        assert config.router.replay is not None
        check_file(config)
        self.inner, self._corpus = inner, corpus
        self._path, self._routes = config.router.replay, config.router.replay_missing == "route"
        self._recorded = read_routed_experts(Path(self._path), FIELD)
        facts = describe_model(config, hash_tokenizer(corpus.tokenizer.to_str()))
        if said := self._recorded.facts.find_difference(facts):
            raise ConfigError(f"{FIELD}={self._path}: {said}")
        self._index = SampleIndex(self._recorded, config.train.seq_len)

    def samples(self, begin: int, end: int) -> Sequences:
        """[B, L + 1] of each, with `experts`; B may be 0. Raises `ConfigError` where tokens are missing that may not
        be."""
        found = self.inner.samples(begin, end)
        batch, length = len(found.tokens), found.tokens.shape[1] - 1
        experts = np.full((batch, length, *self._recorded.experts.shape[1:]), -1, self._recorded.experts.dtype)
        for row, first, last in cut_samples(found, self._corpus.is_chat):
            tokens = found.tokens[row, first:last]
            recorded = self._index.find(tokens)
            experts[row, first : first + len(recorded)] = recorded
            missing = int((experts[row, first:last, 0, 0] < 0).sum())
            if missing and not self._routes:
                text = self._corpus.tokenizer.decode(tokens[:SHOWN].tolist(), skip_special_tokens=False)
                said = f"{missing} of {last - first} tokens have no recorded choice in training sample {begin + row}"
                advice = "router.replay_missing=route has the router choose for them"
                raise ConfigError(f"{FIELD}={self._path}: {said}, which has {text!r}; {advice}")
        return replace(found, experts=experts)

    def count_tokens(self, end: int) -> int:
        """Returns the tokens that go in, without padding, of the global samples before `end`."""
        return self.inner.count_tokens(end)

    def check(self, end: int) -> None:
        """Raise `ConfigError` where the global samples before `end` have tokens that are missing and may not be."""
        for begin in range(0, 0 if self._routes else end, AT_A_TIME):
            self.samples(begin, min(begin + AT_A_TIME, end))

    def describe(self) -> list[str]:
        """Lines that say what is replayed."""
        r, more = self._recorded, self._index.num_equal
        lines = [f"routers replay the choices of {len(r.lengths):,} samples, {len(r.tokens):,} tokens, in {self._path}"]
        if more:
            lines.append(f"{more:,} of them have the tokens of another one, whose choices are taken")
        if r.weights is not None:
            lines.append("recorded weights are not used: those of the chosen experts are computed afresh")
        return lines


class SampleIndex:
    """Recorded samples by their tokens, or of long ones by their first `most`."""

    def __init__(self, recorded: RoutedExperts, most: int) -> None:
        self._experts, self._places = recorded.experts, dict[bytes, tuple[int, int]]()
        ends = recorded.ends.tolist()
        for end, length in zip(ends, recorded.lengths.tolist(), strict=True):
            begin, size = end - length, min(length, most)
            self._places.setdefault(hash_tokens(recorded.tokens[begin : begin + size]), (begin, begin + size))
        self.num_equal = len(ends) - len(self._places)
        self._lengths = np.unique(np.minimum(recorded.lengths, most))[::-1].tolist()

    def find(self, tokens: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return the recorded experts of the longest sample that `tokens` begin with; there may be none."""
        for length in (len(tokens), *(n for n in self._lengths if n < len(tokens))):
            if (place := self._places.get(hash_tokens(tokens[:length]))) is not None:
                return self._experts[slice(*place)]
        return self._experts[:0]


def cut_samples(found: Sequences, is_chat: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first, last + 1) of the tokens that go in, for each conversation, or else each sequence."""
    document = found.document[:, :-1]
    for row, numbers in enumerate(document):
        if not is_chat:
            yield row, 0, len(numbers)
            continue
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for first, last in pairwise(borders):
            if numbers[first] >= 0:
                yield row, first, last


def hash_tokens(tokens: NDArray[np.integer]) -> bytes:
    """Return what tells samples apart."""
    return hashlib.blake2b(tokens.astype(np.int32).tobytes(), digest_size=16).digest()
