"""A checkpoint and teachers go in, trained probes come out."""

__version__ = "0.1.0"
