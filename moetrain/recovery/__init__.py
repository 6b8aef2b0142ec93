"""Going on when something fails: heartbeats, requests to end, steps that are not finite, snapshots in memory."""
