"""Where metrics go: the terminal, JSONL, wandb, TensorBoard."""
