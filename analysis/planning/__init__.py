"""What a run costs, before it starts: `probing plan` and `--dry-run`, which are one thing."""
