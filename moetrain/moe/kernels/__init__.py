"""Grouped GEMM, SwiGLU and sums."""
