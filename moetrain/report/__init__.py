"""One self-contained HTML page that explains a run, or several side by side."""
