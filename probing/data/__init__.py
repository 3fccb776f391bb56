"""Images and conversations, in their official layouts."""
