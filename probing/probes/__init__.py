"""Probes: resampler and ridge readout, and the bank of all of a run's."""
