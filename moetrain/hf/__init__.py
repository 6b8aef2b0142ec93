"""Mixture-of-Experts models of Hugging Face transformers under expert parallelism."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("moetrain.hf needs transformers: pip install 'moetrain[hf]'")

from moetrain.hf.parallel import HFExpertParallel, expert_parallel
from moetrain.hf.routed import describe_choices, read_rollout, record_choices, replay_choices

__all__ = [
    "HFExpertParallel",
    "describe_choices",
    "expert_parallel",
    "read_rollout",
    "record_choices",
    "replay_choices",
]
