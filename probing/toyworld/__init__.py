"""The toy world: simple 3-D scenes with exact labels, and tiny models of the real classes trained on them."""
