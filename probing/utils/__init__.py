"""Files, interruption, loading, processes, errors, progress."""
