"""Runs to and from the Hub."""
