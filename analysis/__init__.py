"""Probes go in, numbers come out."""
