"""Benchmarks, one module each: they measure records (JSON) and tabulate them; `moetrain bench WHAT`."""
