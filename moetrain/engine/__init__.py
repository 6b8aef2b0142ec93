"""Engines: how a model's parameters, gradients and optimizer states lie on the ranks."""
