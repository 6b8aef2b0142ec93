"""What a run shows and keeps: console, metrics, traces, pictures."""
