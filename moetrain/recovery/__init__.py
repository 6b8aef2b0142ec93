"""Going on when something fails: heartbeats, requests to end, steps that are not finite, in-memory checkpoints."""
