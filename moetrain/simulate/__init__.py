"""Predicted step time and memory of a training step on a cluster that need not be here. Loads no torch.

`cluster` reads what a cluster can do, `shape` what a model is, `traffic` draws who chose which expert, `layer` and
`step` predict time, `memory` predicts bytes, `paths` how flows share the spines of a network.
"""
