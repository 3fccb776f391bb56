"""Run directories: their files, manifest, and comparison."""
