"""`moetrain verify`: one optimizer step on a layout of ranks beside the same step in one process."""
