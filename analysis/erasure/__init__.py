"""Whether the model uses what a probe can read: the same, with it erased from the hidden states."""
