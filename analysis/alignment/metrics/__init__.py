"""Measures of projector and patch alignment."""
