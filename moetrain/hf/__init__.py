"""Mixture-of-Experts models of Hugging Face transformers under expert parallelism."""
