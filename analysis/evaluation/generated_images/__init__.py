"""Generated images: the features that FID compares, and the distances between them."""
