"""Numbers go in, pictures and pages come out (no torch here)."""
