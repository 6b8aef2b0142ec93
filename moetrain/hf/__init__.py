"""Mixture-of-Experts models of Hugging Face transformers under expert parallelism."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("moetrain.hf needs transformers: pip install 'moetrain[hf]'")

from moetrain.hf.parallel import HFExpertParallel, expert_parallel

__all__ = ["HFExpertParallel", "expert_parallel"]
