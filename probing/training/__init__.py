"""Training of probes."""
