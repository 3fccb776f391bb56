"""Scores of probes on held-out images."""
