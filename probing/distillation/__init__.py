"""The trainer that makes the checkpoints."""
