"""What judges images: the dual encoder, pixels, metrics."""
