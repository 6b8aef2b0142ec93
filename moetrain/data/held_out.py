"""The held-out text that a model is judged by."""

import numpy as np

from moetrain.config import Config
from moetrain.data.loader import Corpus, Packed, Sequences


def held_out_windows(corpus: Corpus, config: Config, domain: int) -> Sequences:
    """The sequences that a domain is judged by, from all over its held-out text: the same at every time and layout.

    [B, L + 1]; text that does not fill a sequence is one by itself, shorter than the others.
    """
    packed = Packed(corpus, "held_out", config.train.seq_len, seed=0, domain=domain)
    if not packed.num_windows and packed.num_tokens > 1:
        packed = Packed(corpus, "held_out", packed.num_tokens - 1, seed=0, domain=domain)
    wanted = max(1, config.eval.tokens_per_domain // config.train.seq_len)
    spread = np.linspace(0, packed.num_windows, min(wanted, packed.num_windows), endpoint=False).astype(int)
    return packed.windows(spread.tolist())
