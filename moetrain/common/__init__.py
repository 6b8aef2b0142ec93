"""What everything else stands on: files, caches, the terminal, errors."""
