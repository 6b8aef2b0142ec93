"""Corpora, the tokenizer, and the loader."""
