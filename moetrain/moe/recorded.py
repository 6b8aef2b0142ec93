"""Files of recorded choices: which experts every token of a set of samples went to, for replay in training.

`.npz` or `.safetensors`, with these arrays (docs/post-train.md):

    tokens   int32 [T]           the tokens that went in, sample after sample
    lengths  int64 [S]           tokens of each sample
    experts  int16/int32 [T, L, K] the chosen experts of every layer that has experts, in the order of the model;
                                 a token that was not recorded has -1
    weights  float [T, L, K]     optional: their weights then. Training computes them afresh

and the facts of `ChoiceFacts`: in `.safetensors` as metadata, in `.npz` as the JSON text `metadata`. Loads no torch.

S samples, T tokens of all of them, L layers with experts, K experts a token.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.common import disk
from moetrain.common.arrays import BROKEN
from moetrain.common.errors import ConfigError, short

FORMAT, VERSION = "moetrain.routed_experts", 1
SUFFIXES = (".npz", ".safetensors")
Sample = tuple[NDArray[np.integer], NDArray[np.integer]]  # tokens [T], experts [T, L, K]


@dataclass(frozen=True)
class ChoiceFacts:
    """What choices were recorded of."""

    model_type: str  # as config.json has it; moetrain: a preset of ours
    num_experts: int  # the most of any layer; numbers of experts are below it
    num_layers: int  # L
    top_k: int  # K, the most of any layer
    tokenizer: str = ""  # what `hash_tokenizer` returns; empty: not known

    def find_difference(self, other: "ChoiceFacts") -> str:
        """Return in words in what `other` is of another model or tokenizer; empty where it is not."""
        for name in ("num_experts", "num_layers", "top_k", "model_type"):
            own, its = (str(getattr(one, name)).removesuffix("_text") for one in (self, other))
            if own != its:
                return f"recorded with {name}={short(own)}, but the model has {short(its)}"
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            return "recorded with another tokenizer than that of the data"
        return ""


@dataclass(frozen=True)
class RoutedExperts:
    """The choices of S samples."""

    facts: ChoiceFacts
    tokens: NDArray[np.int32]  # [T]
    lengths: NDArray[np.int64]  # [S]
    experts: NDArray[np.integer]  # [T, L, K]
    weights: NDArray[np.floating] | None = None  # [T, L, K]

    @classmethod
    def collect(cls, facts: ChoiceFacts, samples: Iterable[Sample]) -> "RoutedExperts":
        """Put samples together. What was not recorded at the end of one, such as the token that was generated last, is
        left out.

        Raises `ConfigError` for shapes and experts that are not those of `facts`.
        """
        shape, dtype = (facts.num_layers, facts.top_k), np.int16 if facts.num_experts < 1 << 15 else np.int32
        all_tokens, all_experts = [np.zeros(0, np.int32)], [np.zeros((0, *shape), dtype)]
        for number, (tokens, experts) in enumerate(samples):
            if experts.shape != (len(tokens), *shape):
                rule = f"must be {(len(tokens), *shape)}: tokens, layers with experts, experts a token"
                raise ConfigError(f"choices of sample {number}: {experts.shape} {rule}")
            known = np.flatnonzero(experts[:, 0, 0] >= 0)
            end = int(known[-1]) + 1 if len(known) else 0
            all_tokens.append(tokens[:end].astype(np.int32))
            all_experts.append(experts[:end].astype(dtype))
        lengths = np.array([len(part) for part in all_tokens[1:]], np.int64)
        found = cls(facts, np.concatenate(all_tokens), lengths, np.concatenate(all_experts))
        found.check("choices")
        return found

    @property
    def ends(self) -> NDArray[np.int64]:
        """[S] where each sample ends among the tokens."""
        return np.cumsum(self.lengths)

    def check(self, name: str) -> None:
        """Raise `ConfigError` that begins with `name` where shapes, types or numbers cannot be."""
        f, size = self.facts, len(self.tokens)

        def rule(holds: bool, text: str) -> None:
            if not holds:
                raise ConfigError(f"{name}: {text}")

        kinds = (self.tokens.dtype.kind, self.lengths.dtype.kind, self.experts.dtype.kind)
        rule(set(kinds) <= {"i", "u"}, "tokens, lengths and experts must be integers")
        rule(self.tokens.ndim == 1 and self.lengths.ndim == 1, "tokens and lengths must have one dimension")
        shape = (size, f.num_layers, f.top_k)
        rule(self.experts.shape == shape, f"experts are {self.experts.shape}, must be {shape}")
        rule(self.weights is None or self.weights.shape == shape, f"weights must be {shape}, as experts are")
        rule(bool((self.lengths > 0).all()), "every sample must have a token whose choice was recorded")
        total = int(self.lengths.sum())
        rule(total == size, f"lengths sum to {total:,}, but there are {size:,} tokens")
        high, low = (int(self.experts.max()), int(self.experts.min())) if size else (0, 0)
        rule(high < f.num_experts, f"an expert is {high}, must be below num_experts={f.num_experts}")
        rule(low >= -1, f"an expert is {low}; -1 stands for what was not recorded")
        problem = find_problem(self.experts)
        rule(problem is None, str(problem))

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises `ConfigError` for another ending than `SUFFIXES`; `OSError`."""
        arrays: dict[str, Any] = {"tokens": self.tokens, "lengths": self.lengths, "experts": self.experts}
        if self.weights is not None:
            arrays["weights"] = self.weights
        about: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self.facts)}
        about |= {"num_samples": len(self.lengths), "num_tokens": len(self.tokens)}
        check_suffix(path)
        with disk.replacing(path) as out:
            if path.suffix == ".npz":
                np.savez_compressed(out, metadata=np.array(json.dumps(about)), **arrays)
            else:
                from safetensors.numpy import save

                whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
                out.write(save(whole, {name: str(value) for name, value in about.items()}))


def check_suffix(path: Path, name: str = "choices") -> None:
    """Raise `ConfigError` for another ending than `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{name}={path}: must end in {' or '.join(SUFFIXES)}")


def read_facts(path: Path, name: str) -> ChoiceFacts:
    """Return what a file was recorded of, without its arrays. Raises `ConfigError` that begins with `name`=`path`."""
    return _read(path, name, with_arrays=False).facts


def read_routed_experts(path: Path, name: str = "choices") -> RoutedExperts:
    """Return what a file holds. Raises `ConfigError` that begins with `name`=`path` where it is not what it says."""
    found = _read(path, name, with_arrays=True)
    found.check(f"{name}={path}")
    return found


def hash_tokenizer(text: str) -> str:
    """Return what tells tokenizers apart, of the text that `tokenizers.Tokenizer.to_str` returns."""
    return hashlib.sha256(text.encode()).hexdigest()


def find_problem(experts_TLK: NDArray[np.integer]) -> str | None:
    """Return what is wrong with choices, -1 where nothing was recorded; None: nothing.

    A token has choices in all layers or in none, of a layer as many as any other token, and no expert twice.
    """
    used_TLK = experts_TLK >= 0
    known_T = used_TLK.any((1, 2))
    if not known_T.any():
        return None
    partial_T = known_T & (used_TLK != used_TLK[known_T.argmax()]).any((1, 2))
    if partial_T.any() or not used_TLK[known_T.argmax()].any(1).all():
        return f"the choices of token {int(partial_T.argmax()):,} are not whole: other layers or tokens have more"
    ranked_TLK = np.sort(experts_TLK, -1)
    twice_T = ((ranked_TLK[..., 1:] == ranked_TLK[..., :-1]) & (ranked_TLK[..., 1:] >= 0)).any((1, 2))
    return f"token {int(twice_T.argmax()):,} has an expert twice" if twice_T.any() else None


def _read(path: Path, name: str, with_arrays: bool) -> RoutedExperts:
    check_suffix(path, name)
    if not path.is_file():
        raise ConfigError(f"{name}={path}: must be an existing file")
    read = _read_npz if path.suffix == ".npz" else _read_safetensors
    try:
        about, arrays = read(path, with_arrays)
    except BROKEN as error:
        said = " ".join(str(error).split())[:120]
        raise ConfigError(f"{name}={path}: must be a file of recorded choices ({said})") from None
    if about.get("format") != FORMAT or str(about.get("version")) != str(VERSION):
        said = f"its metadata says {short(about.get('format'))}, version {short(about.get('version'))}"
        raise ConfigError(f"{name}={path}: must be {FORMAT}, version {VERSION}; {said}")
    try:
        numbers = {key: int(about[key]) for key in ("num_experts", "num_layers", "top_k")}
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{name}={path}: its metadata must have num_experts, num_layers, top_k ({error})") from None
    facts = ChoiceFacts(str(about.get("model_type", "")), **numbers, tokenizer=str(about.get("tokenizer") or ""))
    nothing = RoutedExperts(facts, np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int16))
    return replace(nothing, **arrays)


def _read_npz(path: Path, with_arrays: bool) -> tuple[Mapping[str, Any], dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["metadata"]))
        if not isinstance(about, dict):
            raise ValueError("metadata is no JSON object")
        return about, _take(file) if with_arrays else {}


def _read_safetensors(path: Path, with_arrays: bool) -> tuple[Mapping[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            arrays = _take({key: file.get_tensor(key) for key in file.keys()}) if with_arrays else {}  # noqa: SIM118
            return file.metadata() or {}, arrays
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _take(arrays: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: arrays[key] for key in ("tokens", "lengths", "experts")}
    return found | {key: arrays[key] for key in ("weights",) if key in arrays}
