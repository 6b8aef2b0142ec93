"""Benchmarks: `moetrain bench WHAT`, a module each, with `records()` for machines and `show()` for people."""
