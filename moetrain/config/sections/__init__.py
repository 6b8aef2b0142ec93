"""The sections of a run's configuration: each field with its type, its bounds and what it means."""
