"""`moetrain doctor`: what a run needs of this host, and of the others it will meet."""
