"""Training data: position → sample, and each sample's image, size and crop."""
