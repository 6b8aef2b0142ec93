"""Mixture-of-Experts models of Hugging Face transformers under expert parallelism."""

from moetrain.hf.parallel import HFExpertParallel, expert_parallel

__all__ = ["HFExpertParallel", "expert_parallel"]
