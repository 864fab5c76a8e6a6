"""Fine-tuning: the loop, and its rooms for data, caches, the filter and state."""
