"""What experts specialise in: domains, and the tokens they like. From held-out text, at every evaluation.

`specialisation/step_N.json` in a run's folder; docs/metrics.md says what is in it.

E experts of a layer, C domains, V vocabulary, T tokens.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.common import disk
from moetrain.common.arrays import Array
from moetrain.data.loader import Corpus
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.moe.layer import LayerStats

EXPERTS = 4  # of a layer, the most specialised
TOKENS = 12  # of an expert
MOST_TOKENS = 1 << 16  # of the text that tokens are counted in, over all ranks
SEEN = 4  # selections of a token by an expert, fewer tell nothing


class TokensOfExperts:
    """Which tokens went to which expert, in the first part of every domain."""

    def __init__(self, num_layers: int, num_domains: int, mesh: Mesh) -> None:
        self._mesh = mesh
        self._most = max(1, MOST_TOKENS // (num_domains * mesh.world))  # of a domain, on this rank
        self._left = [self._most] * num_domains
        self._text: list[Tensor] = []
        self._pairs: list[list[Tensor]] = [[] for _ in range(num_layers)]  # of each layer: [2, N] expert and token

    def add(self, domain: int, tokens_T: Tensor, stats: Sequence[LayerStats]) -> None:
        """Add a forward over text of one domain. Enters no collective."""
        if self._left[domain] <= 0:
            return
        self._left[domain] -= len(tokens_T)
        self._text.append(tokens_T)
        for pairs, s in zip(self._pairs, stats, strict=True):
            token_N, expert_N, made_N = s.choice
            pair = torch.stack([expert_N, tokens_T[token_N]])
            pairs.append(pair if made_N is None else pair[:, made_N])

    def counts(self, layer: int, experts: Sequence[int], vocabulary: int) -> tuple[Array, Array]:
        """Return ([len(experts), V] selections by token, [V] the text), over all ranks. Enters one collective."""
        size = (len(experts) + 1) * vocabulary
        device = self._mesh.device
        slot_E = torch.full((max(experts, default=0) + 1,), len(experts), device=device)
        slot_E[torch.tensor(experts, dtype=torch.int64, device=device)] = torch.arange(len(experts), device=device)
        found = torch.zeros(size, dtype=torch.int64, device=device)
        for expert_N, token_N in self._pairs[layer]:
            wanted_N = expert_N < len(slot_E)
            slot_N = slot_E[expert_N[wanted_N]]
            mine_N = slot_N < len(experts)
            place_N = slot_N[mine_N] * vocabulary + token_N[wanted_N][mine_N]
            found += torch.bincount(place_N, minlength=size)
        for tokens_T in self._text:
            found[len(experts) * vocabulary :] += torch.bincount(tokens_T, minlength=vocabulary)
        table = all_reduce_sum(found).view(len(experts) + 1, vocabulary).cpu().numpy()
        return table[:-1], table[-1]


def domain_information(counts_CE: Array) -> float:
    """Return the mutual information of domain and expert in bits, every domain weighted alike. 0: no specialisation."""
    return float((_load(counts_CE) * expert_information(counts_CE)).sum())


def expert_information(counts_CE: Array) -> Array:
    """Return [E] bits that knowing the expert tells of the domain, beyond that all domains are alike."""
    joint = _joint(counts_CE)
    of_expert = joint / joint.sum(0, keepdims=True).clip(min=1e-30)  # p(domain | expert)
    domain = joint.sum(-1, keepdims=True).clip(min=1e-30)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(of_expert > 0, of_expert * np.log2(of_expert / domain), 0.0)
    return terms.sum(0)


def _joint(counts_CE: Array) -> Array:
    return counts_CE / counts_CE.sum(-1, keepdims=True).clip(min=1) / len(counts_CE)


def _load(counts_CE: Array) -> Array:
    return _joint(counts_CE).sum(0)


def describe(
    names: Sequence[str], counts: Sequence[Array], tokens: TokensOfExperts, corpus: Corpus
) -> list[dict[str, Any]]:
    """Return of every layer its name, counts [C, E], mutual information and most specialised experts.

    All ranks call it with the same counts: it enters a collective for every layer.
    """
    out = []
    for layer, (name, counts_CE) in enumerate(zip(names, counts, strict=True)):
        bits_E, load_E, joint = expert_information(counts_CE), _load(counts_CE), _joint(counts_CE)
        order = np.argsort(-(bits_E * load_E), kind="stable")[:EXPERTS].tolist()
        experts = [e for e in order if load_E[e] > 0]
        liked, text_V = tokens.counts(layer, experts, corpus.vocab_size)
        described = []
        for number, expert in enumerate(experts):
            domain = int(joint[:, expert].argmax())
            described.append(
                {
                    "expert": expert,
                    "domain": corpus.domains[domain],
                    "share": float(joint[domain, expert] / joint[:, expert].sum()),
                    "bits": float(bits_E[expert]),
                    "load": float(counts_CE[:, expert].sum() / counts_CE.sum()),
                    "tokens": liked_tokens(liked[number], text_V, corpus),
                }
            )
        rows = counts_CE.astype(int).tolist()
        out.append({"name": name, "counts": rows, "domain_mi": domain_information(counts_CE), "experts": described})
    return out


def liked_tokens(selected_V: Array, text_V: Array, corpus: Corpus) -> list[dict[str, Any]]:
    """Return the tokens that an expert gets oftener than the text has them: by their part in the Kullback-Leibler
    divergence of what it gets from the text."""
    share_V, usual_V = selected_V / max(selected_V.sum(), 1), text_V / max(text_V.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        score_V = np.where(selected_V >= SEEN, share_V * np.log(share_V / usual_V), -math.inf)
    best = [int(token) for token in np.argsort(-score_V, kind="stable")[:TOKENS] if score_V[token] > 0]
    return [
        {
            "text": corpus.tokenizer.decode([token], skip_special_tokens=False),
            "count": int(selected_V[token]),
            "lift": float(share_V[token] / usual_V[token]),
        }
        for token in best
    ]


def write(folder: Path, step: int, domains: Sequence[str], layers: list[dict[str, Any]]) -> None:
    """Write `specialisation/step_N.json` of the run's folder, whole or not at all."""
    path = folder / "specialisation" / f"step_{step}.json"
    with suppress(OSError):  # a disk that is full or read-only does not stop a run
        path.parent.mkdir(exist_ok=True)
        disk.write(path, json.dumps({"step": step, "domains": list(domains), "layers": layers}))


def forget(folder: Path, first_step: int) -> None:
    """Remove what a run resumed after `first_step` will find again."""
    for path in (folder / "specialisation").glob("step_*.json"):
        if int(path.stem.removeprefix("step_")) > first_step:
            path.unlink()
