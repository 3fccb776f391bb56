"""What the projector discards, and whether patches match words."""
