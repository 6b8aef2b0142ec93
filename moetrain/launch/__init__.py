"""Starting workers, their lives, signals and ends."""
