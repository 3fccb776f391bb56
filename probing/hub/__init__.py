"""Publishes, downloads and imports trained probes."""
