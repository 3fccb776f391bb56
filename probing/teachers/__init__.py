"""Frozen vision teachers, one file per kind."""
